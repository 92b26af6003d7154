"""The server as a Ray Serve application, for `serve run powerinfer.serving.ray:app model=FILE replicas=2`."""

from typing import Any

from powerinfer_tools.serving.replicas.ray_serve import AppOptions, application

__all__ = ["AppOptions", "app"]


def app(options: AppOptions) -> Any:
    """Replicas of one model behind one address. Ray Serve calls it with the options of its command line."""
    return application(options)
