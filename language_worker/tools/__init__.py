"""What a model may call while it answers: it writes an expression, the result is written into its output for it."""
