"""Ways to run the same ServerApp and ClientApp: Flower's simulation on Ray, or one process."""
