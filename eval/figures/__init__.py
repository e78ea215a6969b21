"""Pictures of what a method keeps, and what they are drawn from."""
