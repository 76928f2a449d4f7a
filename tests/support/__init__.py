"""Shared by several test files: no tests here."""
