from hub.fixtures import client, hub, running_hub

__all__ = ["client", "hub", "running_hub"]
