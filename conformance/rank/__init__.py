"""What runs inside a rank process: inputs, programs, judging. This half imports torch; the driver never imports it."""
