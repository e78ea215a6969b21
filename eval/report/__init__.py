"""What is printed of results."""
