"""A browser for tests: `fake_browser.py PORT URL` loads the page and sends its URL and title to a port of this machine."""

import re
import socket
import sys
import urllib.request

port, url = sys.argv[1:]
page = urllib.request.urlopen(url, timeout=60).read().decode()
title = re.search("<title>(.*?)</title>", page)
with socket.create_connection(("127.0.0.1", int(port))) as reader:
    reader.sendall(f"{url} {title[1] if title else ''}".encode())
