"""The gateway of Layercast: OpenAI-compatible HTTP in front, replicas behind, and no request lost in between."""
