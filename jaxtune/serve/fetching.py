"""Files from elsewhere by https, for hosts that allow it: what a stranger's address may not make this machine do.

A name is resolved once, all its addresses must be public, and the connection goes to one of those, whatever the name
means a moment later. No redirects, no other port, no proxy: a cloud's metadata server and its tokens are out of reach.
"""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
from urllib.parse import urlsplit

from jaxtune.errors import UserError
from jaxtune.serve.store.storage import Writing

_PORT = 443
_PIECE_S, _ALL_S = 30.0, 1800.0
_PIECE = 2**18


class _Pinned(http.client.HTTPSConnection):
    """Goes to an address that was looked at, and wants the certificate of the name."""

    def __init__(self, host: str, address: str) -> None:
        super().__init__(host, _PORT, timeout=_PIECE_S)
        self._address = address

    def connect(self) -> None:
        plain = socket.create_connection((self._address, _PORT), _PIECE_S)
        self.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=self.host)

    def hang_up(self) -> None:
        """End it from another thread, whatever it waits for."""
        if self.sock is not None:
            self.sock.shutdown(socket.SHUT_RDWR)


def fetch(url: str, writing: Writing) -> None:
    """Write what an https URL holds.

    Raises:
      UserError: the URL is none of ours to ask, or does not answer with a file.
      TooLarge: it is larger than may be written.
    """
    parts = urlsplit(url)
    try:
        fine = parts.scheme == "https" and parts.hostname and parts.port in (None, _PORT) and parts.username is None
    except ValueError:  # a port that is no number
        fine = False
    if not fine or parts.hostname is None or not url.isascii() or not url.isprintable() or " " in url:
        raise UserError("give https://HOST/PATH, without a port or a password, in ASCII")
    connection = _Pinned(parts.hostname, address_of(parts.hostname))
    ending = threading.Timer(_ALL_S, connection.hang_up)
    ending.start()
    try:
        with contextlib.closing(connection):
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", target, headers={"Accept-Encoding": "identity"})
            answer = connection.getresponse()
            if answer.status != 200:
                raise UserError(f"its host answers {answer.status}; redirects are not followed")
            while piece := answer.read(_PIECE):
                writing.write(piece)
            if answer.length:
                raise UserError("it broke off, or took too long")
    except (OSError, http.client.HTTPException) as e:
        raise UserError(f"it cannot be had ({type(e).__name__})") from e
    finally:
        ending.cancel()


def address_of(host: str) -> str:
    """An address of a host, all of whose addresses are public. Raises: UserError: it has none, or another one too."""
    found = _addresses(host)
    if not found or not all(public(a) for a in found):
        raise UserError("its host is not a public one")
    return min(found)


def _addresses(host: str) -> set[str]:
    try:
        return {str(a[4][0]) for a in socket.getaddrinfo(host, _PORT, socket.AF_INET, socket.SOCK_STREAM)}
    except (OSError, UnicodeError) as e:
        raise UserError("its host has no address") from e


def public(address: str) -> bool:
    """Whether an IPv4 address is of the internet at large.

    >>> public("8.8.8.8"), public("169.254.169.254"), public("10.0.0.1"), public("127.0.0.1"), public("224.0.0.1")
    (True, False, False, False, False)
    """
    ip = ipaddress.IPv4Address(address)
    return ip.is_global and not ip.is_multicast
