"""A LLaVA of two million weights, the drawn world it answers about, and eight small data sets."""
