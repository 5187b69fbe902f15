"""`python -m bench.live`: what each way to scale up costs those who wait, with real processes, on one machine."""
