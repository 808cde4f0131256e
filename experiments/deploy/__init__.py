"""What production runs: join, checks, certificates, serve, supervise."""
