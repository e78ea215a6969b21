"""What to evaluate: tables of rows and tasks."""
