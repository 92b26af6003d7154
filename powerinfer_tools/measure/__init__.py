"""What a machine can do: hardware profile, curves, bench rows, synthetic models."""
