"""What a run leaves behind: its folder, checkpoints and pictures."""
