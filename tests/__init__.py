"""Tests of dynquant: a room for each kind, ``support`` for what several share."""
