"""What a training costs, told before it starts."""
