"""What both apps share: configuration, wire format, parameters, seeding, metrics, errors."""
