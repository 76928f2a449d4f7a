"""Reports, accuracy and speed limits."""
