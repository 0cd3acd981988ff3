"""A local TCP proxy for one worker's control connection, where the script has no network of its own to cut.

shut(): connections break at once. hold()/release(): bytes wait, as behind a black hole that mends.
"""
import contextlib
import socket
import threading


class Door:
    def __init__(self, port):
        self.to = port
        self.is_open = threading.Event()
        self.is_open.set()
        self.lock = threading.Lock()
        self.pairs = set()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            self.is_open.wait()
            try:
                far = socket.create_connection(("127.0.0.1", self.to), timeout=5)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            pair = (near, far)
            with self.lock:
                self.pairs.add(pair)
            for a, b in (pair, pair[::-1]):
                threading.Thread(target=self.pump, args=(a, b, pair), daemon=True).start()

    def pump(self, a, b, pair):
        with contextlib.suppress(OSError):
            while data := a.recv(1 << 16):
                self.is_open.wait()
                b.sendall(data)
        self.drop(pair)

    def drop(self, pair):
        with self.lock:
            if pair not in self.pairs:
                return
            self.pairs.discard(pair)
        for end in pair:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def shut(self):
        for pair in list(self.pairs):
            self.drop(pair)

    def hold(self):
        self.is_open.clear()

    def release(self):
        self.is_open.set()

    def close(self):
        self.release()
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.shut()
