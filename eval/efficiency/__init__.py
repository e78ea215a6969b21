"""Where the time goes: requests, towers and methods, timed in turn."""
