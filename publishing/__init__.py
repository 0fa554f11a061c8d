"""A checkpoint of this package, published on the Hub: assemble, verify, upload."""

from .assemble import assemble
from .publish import publish
from .upload import upload
from .verify import Report, verify

__all__ = ["Report", "assemble", "publish", "upload", "verify"]
