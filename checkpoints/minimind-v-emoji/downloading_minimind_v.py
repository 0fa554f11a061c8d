"""The content of an URL: one deadline for all of it, http(s) only, and no private addresses."""

import asyncio
import concurrent.futures
import ipaddress
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from huggingface_hub.utils import httpx

TIMEOUT = 20  # seconds, for the whole of a download
MAX_REDIRECTS = 5
MAX_BYTES = 64 * 2**20
TRANSLATED = ipaddress.IPv6Network("64:ff9b::/96")  # addresses of IPv4 in networks of IPv6 only (RFC 6052)


class Refusal(Exception):
    """Why something is not fetched, in our own words."""


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
    # In a thread, because where the caller runs an event loop already, it cannot run another one. The thread is not
    # waited for, because nothing can stop the system's look-up of a name.
    executor = ThreadPoolExecutor(max_workers=1)
    try:
        fetching = asyncio.wait_for(_fetch(url, allowed_hosts), TIMEOUT)
        return executor.submit(asyncio.run, fetching).result(TIMEOUT + 1)
    except (asyncio.TimeoutError, concurrent.futures.TimeoutError, httpx.TimeoutException):
        reason = f"it takes more than {TIMEOUT} seconds"
    except (httpx.ConnectError, socket.gaierror):
        reason = "there is no connection to its host"
    except Refusal as error:
        reason = str(error)
    except Exception as error:  # HTTP libraries have many, which may hold what the server said
        reason = f"the connection failed ({type(error).__name__})"
    finally:
        executor.shutdown(wait=False)
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
                    raise Refusal(f"its host answered with status {response.status_code}")
                async for chunk in response.aiter_bytes():
                    content += chunk
                    if len(content) > MAX_BYTES:
                        raise Refusal(f"it has more than {MAX_BYTES} bytes")
                return bytes(content)
    raise Refusal(f"it is redirected more than {MAX_REDIRECTS} times")


async def _find_address(url: Any, allowed_hosts: Sequence[str] | None) -> str:
    """The address of an URL's host, of IPv4 where it has one; a refusal if it may not be asked."""
    if url.scheme not in ("http", "https") or not url.host:
        raise Refusal("it is redirected to something else than http(s)")
    host, port = url.host.rstrip("."), url.port or (443 if url.scheme == "https" else 80)
    if not is_allowed(host, allowed_hosts):
        raise Refusal("its host is not an allowed one" if allowed_hosts else "fetching is switched off")
    if port > 65535:
        raise Refusal(f"there is no port {port}")
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
    if allowed_hosts is None and not all(map(is_public, addresses)):
        raise Refusal("its host has a private address; allow it by name (allowed_hosts)")
    return str(min(addresses, key=lambda address: address.version))


def is_url(text: str) -> bool:
    """Whether this is the address of something to fetch."""
    return text[:8].lower().startswith(("http://", "https://"))


def host_names(text: str) -> list[str]:
    """Names with commas between, as a list."""
    return [name.strip() for name in text.split(",") if name.strip()]


def is_allowed(host: str, allowed_hosts: Sequence[str] | None) -> bool:
    """Whether a host is one of [`download`]'s `allowed_hosts`, however both are written."""
    if allowed_hosts is None:
        return True
    names = [allowed_hosts] if isinstance(allowed_hosts, str) else allowed_hosts
    return host.lower().rstrip(".") in (name.lower().rstrip(".") for name in names)


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an address is one of the whole internet, also where one of IPv6 stands for one of IPv4."""
    if isinstance(address, ipaddress.IPv6Address):
        embedded = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF) if address in TRANSLATED else None
        if embedded := embedded or address.ipv4_mapped or address.sixtofour:
            return is_public(embedded)
        if address.is_site_local:
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def without_secrets(url: str) -> str:
    """An URL without user name, password and query, for messages."""
    scheme, _, rest = url.partition("://")
    host, slash, path = rest.partition("?")[0].partition("#")[0].partition("/")
    text = f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"
    return text if len(text) <= 200 else text[:197] + "..."


__all__ = ["download", "host_names", "is_allowed", "is_url", "without_secrets"]
