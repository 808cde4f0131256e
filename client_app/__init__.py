"""The Flower ClientApp: local models, data, training and what stays on the client."""
