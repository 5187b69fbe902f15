"""The operator: decides how many replicas serve each model, where they are, and who feeds whom.

Never on the path of a request, and never importing torch. `docs/architecture.md` walks through a pass.
"""
