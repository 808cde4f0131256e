"""What participants bring: their models and their pictures, small."""
