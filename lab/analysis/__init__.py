"""What is done with models and runs from outside."""
