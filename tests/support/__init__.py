"""Code shared by several test files; contains no tests."""
