"""Many runs from one file: a grid, variants and seeds; resumable, in the background if wanted."""
