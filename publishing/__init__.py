"""A checkpoint of this package, published on the Hub: assemble, verify, upload."""

from .assemble import assemble
from .publish import publish
from .space import publish_space
from .static_space import publish_static_space
from .upload import upload
from .verify import Report, verify

__all__ = ["Report", "assemble", "publish", "publish_space", "publish_static_space", "upload", "verify"]
