"""The content of an URL: one deadline for all of it, http(s) only, and no private addresses."""

import asyncio
import ipaddress
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from huggingface_hub.utils import httpx

TIMEOUT = 20  # seconds, for the whole of a download
MAX_REDIRECTS = 5
MAX_BYTES = 64 * 2**20


def download(url: str, name: str = "image", allowed_hosts: Sequence[str] | None = None) -> bytes:
    """The content of an http(s) URL, at most `MAX_BYTES`, within `TIMEOUT` seconds in all.

    Args:
        url: What to fetch; up to `MAX_REDIRECTS` redirects to other http(s) URLs are followed. Proxies are not used.
        name: What error messages call it.
        allowed_hosts: Names of the only hosts that are asked, whose addresses may be private ones; empty: nothing is
            fetched. Left out, every host with a public address.

    Raises:
        ValueError: It cannot be fetched. The message holds nothing that the server sent, and no password.
    """
    # In a thread, because where the caller runs an event loop already, it cannot run another one.
    with ThreadPoolExecutor(max_workers=1) as executor:
        fetching = asyncio.wait_for(_fetch(url, allowed_hosts), TIMEOUT)
        try:
            return executor.submit(asyncio.run, fetching).result()
        except (asyncio.TimeoutError, httpx.TimeoutException):
            reason = f"it takes more than {TIMEOUT} seconds"
        except (httpx.ConnectError, socket.gaierror):
            reason = "there is no connection to its host"
        except (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError) as error:
            reason = f"the connection failed ({type(error).__name__})"
        except ValueError as error:
            reason = str(error)
    raise ValueError(f"{name} cannot be downloaded: {reason}")


async def _fetch(url: str, allowed_hosts: Sequence[str] | None) -> bytes:
    target, content = httpx.URL(url), bytearray()
    async with httpx.AsyncClient(trust_env=False, timeout=TIMEOUT) as client:
        for _ in range(MAX_REDIRECTS + 1):
            # The address that was looked at is the one that is asked, whatever the name server says next time.
            at_address = target.copy_with(host=await _find_address(target, allowed_hosts))
            headers = {"Host": target.netloc.decode(), "User-Agent": "minimind-v", "Accept-Encoding": "identity"}
            options: dict[str, Any] = {"headers": headers, "extensions": {"sni_hostname": target.host}}
            async with client.stream("GET", at_address, **options) as response:
                if response.has_redirect_location:
                    target = target.join(response.headers["location"])
                    continue
                if not response.is_success:
                    raise ValueError(f"its host answered with status {response.status_code}")
                async for chunk in response.aiter_bytes():
                    content += chunk
                    if len(content) > MAX_BYTES:
                        raise ValueError(f"it has more than {MAX_BYTES} bytes")
                return bytes(content)
    raise ValueError(f"it is redirected more than {MAX_REDIRECTS} times")


async def _find_address(url: Any, allowed_hosts: Sequence[str] | None) -> str:
    """The address of an URL's host; a ValueError if it may not be asked."""
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError("it is redirected to something else than http(s)")
    if allowed_hosts is not None and url.host not in allowed_hosts:
        raise ValueError("fetching is switched off" if not allowed_hosts else "its host is not an allowed one")
    default = 443 if url.scheme == "https" else 80
    found = await asyncio.get_running_loop().getaddrinfo(url.host, url.port or default, type=1)
    addresses = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
    for address in addresses if allowed_hosts is None else ():
        if not (getattr(address, "ipv4_mapped", None) or address).is_global:
            raise ValueError("its host has a private address; allow it by name (allowed_hosts)")
    return str(addresses[0])


def without_secrets(url: str) -> str:
    """An URL without user name, password and query, for messages."""
    scheme, _, rest = url.partition("://")
    host, slash, path = rest.partition("?")[0].partition("#")[0].partition("/")
    text = f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"
    return text if len(text) <= 200 else text[:197] + "..."


__all__ = ["download", "without_secrets"]
