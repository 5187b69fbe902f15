"""The worker: the process that owns one device and runs the engine.

One process a device, started warm by the agent long before any model is assigned. Three kinds of threads live in
it and meet only through queues: the asyncio thread (the wire), the engine thread (`engine_loop`), and the transfer's
threads (`layercast_agent.runner`).
"""
