#!/usr/bin/env python3
"""Bad input on every way in, and TLS with wrong certificates: a clear word, the right exit code, nobody disturbed.

usage: security_test.py PROGRAM GROUP     GROUP: input | tls
Python's standard library only. While the cases run, a job trains on two workers ("the convoy"); after each of them it
must have gone on in the same generation, and every job of it must end with the golden hash.
"""
import base64
import http.client
import json
import os
import pathlib
import random
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import warnings

sys.dont_write_bytecode = True
from cluster import PROGRAM, ROOT, Cluster, check, explicit, golden, job_file, main, make_text, same, say

CONVOY_STEPS = 150
NOISE = random.Random(11)


def until(condition, seconds=15):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return bool(condition())


def log_of(cluster, name="coordinator"):
    return (cluster.folder / "logs" / f"{name}.log").read_text(errors="replace")


def logged(cluster, *words, name="coordinator", seconds=10):
    """True when one line of the log holds all the words."""
    return until(lambda: any(all(w in line for w in words) for line in log_of(cluster, name).splitlines()), seconds)


def link_port_of(cluster, name):
    address, = (w["address"] for w in cluster.call("GET", "/workers")["workers"] if w["name"] == name)
    return int(address.rsplit(":", 1)[1])


def needs(pool):
    return f"resources: {{labels: {{pool: {pool}}}}}"


class Convoy:
    """Healthy jobs on two workers, one after the other, as long as the test needs them."""

    def __init__(self, cluster):
        self.cluster = cluster
        self.number = 0
        self.ended = 0
        for _ in range(2):
            cluster.start_worker("--label", "pool=convoy")
        self.next()

    def next(self):
        self.number += 1
        self.name = f"convoy-{self.number}"
        shape = explicit(2, 1) if self.number % 2 else explicit(1, 2)
        self.cluster.submit(job_file(self.name, CONVOY_STEPS, "2", shape + "\n" + needs("convoy"), "50 steps"))
        self.cluster.wait(self.name, lambda v: v["state"] == "RUNNING" and v["step"] >= 1 or v["state"] == "COMPLETED")

    def settle(self, view):
        self.ended += 1
        check(view["generation"] == 1, f"{self.name} needed one generation: {view['generation']}")
        same(view, CONVOY_STEPS, f"{self.name} ends with the golden hash")

    def goes_on(self, words):
        before = self.cluster.job(self.name)
        view = self.cluster.wait(self.name, lambda v: v["state"] in ("COMPLETED", "FAILED") or v["step"] > before["step"],
                                 20, "a further step")
        alive = self.cluster.coordinator.poll() is None
        fine = alive and view["generation"] == 1 and view["state"] in ("RUNNING", "COMPLETED")
        check(fine, f"after {words}: the coordinator runs, {self.name} goes on ({view['state']}, step {view['step']})")
        if view["state"] != "RUNNING":
            self.settle(view)
            self.next()

    def finish(self):
        self.settle(self.cluster.finish(self.name))


def expect(words, done, code, *texts):
    said = done.stdout + done.stderr
    missing = [t for t in texts if t not in said]
    check(done.returncode == code and not missing,
          f"{words}: exit {code}" + (f"; got {done.returncode}, missing {missing} in: {said[:1500]}"
                                     if done.returncode != code or missing else ""))


# ---- raw peers -------------------------------------------------------------------------------------------------

def connect(port):
    s = socket.create_connection(("127.0.0.1", port), timeout=10)
    s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return s


def exchange(port, data, seconds=5):
    """Sends bytes, returns what comes back until the other side closes (or nothing comes for a while)."""
    s = connect(port)
    s.settimeout(seconds)
    got = b""
    try:
        s.sendall(data)
    except OSError:
        pass  # closed while we talked: what it said may still be there
    try:
        while len(got) < 1 << 20:
            more = s.recv(65536)
            if not more:
                break
            got += more
    except OSError:
        pass
    s.close()
    return got


def http_call(port, method, path, body=None, headers=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, body, headers or {})
        reply = connection.getresponse()
        text = reply.read().decode(errors="replace")
        try:
            return reply.status, json.loads(text)
        except ValueError:
            return reply.status, text
    finally:
        connection.close()


def post(port, path, value, **headers):
    body = value if isinstance(value, (bytes, str)) else json.dumps(value)
    return http_call(port, "POST", path, body, {"Content-Type": "application/json", **headers})


class RawWorker:
    """A WebSocket on /control that says what it likes."""

    def __init__(self, port, wrap=None):
        self.socket = connect(port)
        if wrap is not None:
            self.socket = wrap(self.socket)
        self.socket.sendall((f"GET /control HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\n"
                             f"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
                             f"Sec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}\r\n\r\n").encode())
        self.rest = b""
        while b"\r\n\r\n" not in self.rest:
            more = self.socket.recv(4096)
            if not more:
                break
            self.rest += more
        head, _, self.rest = self.rest.partition(b"\r\n\r\n")
        self.status = int(head.split()[1]) if head.startswith(b"HTTP/") else 0

    def frame(self, payload, opcode=1, masked=True, length=None):
        length = len(payload) if length is None else length
        head = bytes([0x80 | opcode])
        bit = 0x80 if masked else 0
        if length < 126:
            head += bytes([bit | length])
        elif length < 65536:
            head += bytes([bit | 126]) + struct.pack(">H", length)
        else:
            head += bytes([bit | 127]) + struct.pack(">Q", length)
        try:
            if not masked:
                self.socket.sendall(head + payload)
            else:  # a mask of zeros is a mask
                self.socket.sendall(head + bytes(4) + payload)
        except OSError:
            pass
        return self

    def say(self, message):
        return self.frame(message.encode() if isinstance(message, str) else json.dumps(message).encode())

    def take(self, count):
        while len(self.rest) < count:
            more = self.socket.recv(65536)
            if not more:
                raise ConnectionError
            self.rest += more
        got, self.rest = self.rest[:count], self.rest[count:]
        return got

    def read(self, seconds=10):
        """(texts, close code, close reason) until the end; a code of 0: no close frame came."""
        self.socket.settimeout(seconds)
        texts = []
        try:
            while True:
                first, length = self.take(2)
                length &= 0x7F
                if length == 126:
                    length = struct.unpack(">H", self.take(2))[0]
                elif length == 127:
                    length = struct.unpack(">Q", self.take(8))[0]
                payload = self.take(length)
                if first & 15 == 8:
                    return texts, struct.unpack(">H", payload[:2])[0], payload[2:].decode(errors="replace")
                if first & 15 == 1:
                    texts.append(payload.decode(errors="replace"))
        except OSError:
            return texts, 0, ""
        finally:
            self.socket.close()


def hello(name, protocol=1, **more):
    return {"type": "hello", "protocol": protocol, "name": name, "process": "ab" * 16, "host": "mars", "device": "cpu",
            "threads": 1, **more}


# ---- input: job files -----------------------------------------------------------------------------------------

def bad_specs():
    good = pathlib.Path(job_file("good", 10)).read_text()

    def changed(old, new):
        assert old in good, old
        return good.replace(old, new)

    anchors = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    return [
        ("a YAML depth bomb of lists", "version: 1\nname: " + "[" * 100_000, []),
        ("a YAML depth bomb of maps", good + "\nx: " + "{a: " * 50_000, []),
        ("a YAML alias bomb", good + anchors, []),
        ("a key that stands twice", good + "stop: {steps: 11}\n", ["duplicate key", "stop"]),
        ("an octal number", changed("steps: 10}", "steps: 010}"), ["010"]),
        ("an unknown key", changed("optimizer:", "optimzer:"), ["optimzer", "optimizer"]),
        ("more stages than the model has parts", good + explicit(60, 1) + "\n", ["stages", "60"]),
        ("a number that overflows", changed("steps: 10}", "steps: 99999999999999999999999}"), ["steps"]),
        ("a size that overflows", changed("model: {preset: tiny}",
                                          "model: {preset: tiny, d_model: 9223372036854775807}"), ["d_model"]),
        ("sizes whose product overflows", changed("{global: 16 sequences, micro: 1, sequence: 64,",
                                                  "{global: 4611686018427387904 sequences, micro: 1, sequence: 64,"),
         ["batch"]),
        ("no mapping at all", "- just\n- a list\n", []),
        ("an empty file", "", []),
        ("bytes that are no UTF-8", good + "#\xff\xfe".encode("latin-1").decode("latin-1"), None),
        ("control characters", good + "x: \x01\x02\n", []),
    ]


def group_input():
    cluster = Cluster("input")
    try:
        golden(CONVOY_STEPS)
        cluster.start_coordinator()
        port = cluster.port
        # Opened now, looked at in the end: requests and greetings that never come.
        slow = [connect(port) for _ in range(20)]
        for i, s in enumerate(slow):
            s.sendall(b"POST /api/v1/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Le"[:i * 3])
        slow_since = time.monotonic()
        half = RawWorker(port)  # half a frame, and then nothing: no answer to a ping either
        half.socket.sendall(bytes([0x81, 0x80 | 126]) + struct.pack(">H", 5000) + bytes(4) + b'{"type": "hel')
        slow.append(half.socket)
        convoy = Convoy(cluster)
        link_port = link_port_of(cluster, "w1")
        slow_links = [connect(link_port) for _ in range(100)]  # more than the port keeps ungreeted

        input_job_files(cluster, convoy)
        input_data_files(cluster, convoy)
        input_http(cluster, convoy)
        input_control(cluster, convoy)
        input_links(cluster, convoy, link_port)
        input_changed_data(cluster, convoy)
        input_processes(cluster, convoy)
        input_full_disk(cluster, convoy)

        time.sleep(max(0.0, 12 - (time.monotonic() - slow_since)))
        check(all(is_closed(s) for s in slow[1:]), "requests and a message that never end are closed after their time")
        check(sum(is_closed(s) for s in slow_links) >= 30, "of 100 silent dialers of a link port the oldest are closed")
        convoy.finish()
        check(convoy.ended >= 1, f"the convoy: {convoy.ended} jobs")
    finally:
        cluster.close()


def is_closed(s):
    s.settimeout(0.2)
    try:
        while True:
            if s.recv(4096) == b"":
                return True
    except TimeoutError:
        return False
    except OSError:
        return True


def input_job_files(cluster, convoy):
    for words, text, said in bad_specs():
        path = ROOT / "bad.yaml"
        path.write_bytes(text.encode("latin-1") if said is None else text.encode())
        done = cluster.cli("submit", str(path), "-d")
        if said is not None:
            expect(f"submit of {words}", done, 3, "bad.yaml", *said)
        else:
            expect(f"submit of {words}", done, 3)
        if said is None:
            continue
        status, reply = post(cluster.port, "/api/v1/jobs", {"yaml": text, "file": "bad.yaml"})
        problems = reply.get("problems", []) if isinstance(reply, dict) else []
        check(status == 400 and problems and all(p["file"] == "bad.yaml" and p["message"] for p in problems),
              f"POST of {words}: 400 with {len(problems)} problems" + ("" if problems else f": {status} {str(reply)[:500]}"))
    many = pathlib.Path(job_file("many", 10)).read_text().replace("optimizer:", "optimzer:").replace(
        "steps: 10}", "steps: ten}").replace("preset: tiny", "preset: tinny")
    (ROOT / "many.yaml").write_text(many)
    done = cluster.cli("submit", str(ROOT / "many.yaml"), "-d")
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "many.yaml:" in line and "error" in line]
    check(done.returncode == 3 and len(lines) >= 3, f"all errors at once: {len(lines)} lines")
    check([j["name"] for j in cluster.call("GET", "/jobs?all=1")["jobs"]] == [convoy.name] or convoy.number > 1,
          "no job came of any of them")
    convoy.goes_on("bad job files")


def input_data_files(cluster, convoy):
    def submit(words, text, *said):
        (ROOT / "data-job.yaml").write_text(text)
        done = cluster.cli("submit", str(ROOT / "data-job.yaml"), "-d")
        expect(words, done, 3, *said)

    good = pathlib.Path(job_file("data-job", 10)).read_text()
    entry = f"{{path: {ROOT / 'text.txt'}, format: text}}"
    assert entry in good
    missing = ROOT / "nowhere.txt"
    submit("a missing data file", good.replace(str(ROOT / "text.txt"), str(missing)), str(missing))
    submit("a folder as data file", good.replace(str(ROOT / "text.txt"), str(ROOT)), str(ROOT))
    header = struct.pack("<256i", 20240520, 1, 5000, *([0] * 253))
    for name, data, said in [
            ("truncated.bin", header + struct.pack("<100H", *([1] * 100)), "5000"),
            ("header.bin", header[:100], "header"),
            ("odd.bin", header + b"\0" * 9999, ""),
            ("over.bin", header + struct.pack("<5000H", *([7] * 4321 + [300] + [7] * 678)), "300"),
            ("empty.txt", b"", ""),
            ("short.txt", b"too short", "")]:
        path = ROOT / name
        path.write_bytes(data)
        form = "text" if name.endswith(".txt") else "llmc"
        submit(f"data file {name}", good.replace(entry, f"{{path: {path}, format: {form}}}"), str(path), said)
    convoy.goes_on("bad data files")


# ---- input: ports ----------------------------------------------------------------------------------------------

def input_http(cluster, convoy):
    port = cluster.port
    huge = json.dumps({"yaml": "x" * (3 << 20)})
    status, _ = post(port, "/api/v1/jobs", huge)
    check(status == 413, f"a body of 3 MB: {status}")
    got = exchange(port, b"POST /api/v1/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                         b"Content-Length: 99999999999999999999999\r\n\r\n")
    check(b" 400 " in got[:20] or b" 413 " in got[:20], f"an impossible Content-Length: {got[:30]}")
    got = exchange(port, b"POST /api/v1/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                         b"Transfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFF\r\n" + b"x" * 100_000)
    check(b" 400 " in got[:20] or b" 413 " in got[:20], f"an endless chunk: {got[:30]}")
    got = exchange(port, b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Long: " + b"a" * (1 << 20) + b"\r\n\r\n")
    check(b" 431 " in got[:20], f"a header of 1 MB: {got[:40]}")
    for _ in range(10):
        exchange(port, NOISE.randbytes(4096), 0.3)
    got = exchange(port, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + NOISE.randbytes(500))
    check(b"200 OK" not in got, "a TLS greeting at the plain port is no request")
    check(logged(cluster, "request_refused", "127.0.0.1:"), "refused requests are in the log with their address")
    for words, body, code in [("no JSON", b"{", 400), ("a JSON depth bomb", b"[" * 100_000, 400),
                              ("a JSON object depth bomb", b'{"a":' * 100_000 + b"1" + b"}" * 100_000, 400),
                              ("a list", b"[]", 400),
                              ("a key twice", b'{"yaml": "a", "yaml": "b"}', 400), ("no yaml", b"{}", 400),
                              ("a number as yaml", b'{"yaml": 1}', 400)]:
        status, reply = post(port, "/api/v1/jobs", body)
        check(status == code and isinstance(reply, dict) and reply.get("error", {}).get("message"),
              f"a body with {words}: {status}" + ("" if status == code else f" {str(reply)[:300]}"))
    for path in ["/api/v1/jobs/%00", "/api/v1/jobs/" + "a" * 5000, "/api/v1/jobs/..%2f..%2fetc", "/api/v1/%zz",
                 f"/api/v1/jobs/{convoy.name}/checkpoints/-1", f"/api/v1/jobs/{convoy.name}/events?since=x"]:
        status, _ = http_call(port, "GET", path)
        check(status in (400, 404), f"GET {path[:40]}: {status}")

    # A page of another site must not reach the API: DNS rebinding, forms, cross-origin calls.
    status, _ = http_call(port, "GET", "/api/v1/jobs", headers={"Host": "evil.example:7070"})
    check(status == 421, f"another Host header: {status}")
    for form in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        status, _ = http_call(port, "POST", f"/api/v1/jobs/{convoy.name}/cancel", "{}", {"Content-Type": form})
        check(status == 415, f"POST of {form.split(';')[0]}: {status}")
    status, _ = post(port, f"/api/v1/jobs/{convoy.name}/cancel", {}, Origin="https://evil.example")
    check(status == 403, f"POST with another Origin: {status}")
    status, _ = http_call(port, "GET", "/api/v1/jobs", headers={"Origin": "null"})
    check(status == 403, f"GET with Origin null: {status}")
    convoy.goes_on("bad HTTP")


def input_control(cluster, convoy):
    port = cluster.port
    page = connect(port)
    page.sendall(f"GET /control HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                 f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {base64.b64encode(bytes(16)).decode()}\r\n"
                 f"Origin: http://127.0.0.1:{port}\r\n\r\n".encode())
    check(b" 403 " in page.recv(100), "a web page can't open the control channel")
    page.close()
    for words, texts in [("no JSON", "garbage"), ("a list", "[]"), ("no type", "{}"), ("an unknown type", {"type": "x"}),
                         ("a JSON depth bomb", "[" * 100_000),
                         ("a deep object", '{"type":' * 100_000 + "1" + "}" * 100_000),
                         ("a hello of wrong types", {"type": "hello", "protocol": "one"}),
                         ("a number out of range", {"type": "beat", "job": -1}),
                         ("a phase that is none", {"type": "beat", "phase": 99})]:
        _, code, reason = RawWorker(port).say(texts).read()
        check(code == 1008 and reason, f"a control message with {words}: closed, {code} {reason[:60]}")
    check(logged(cluster, "bad_message"), "bad messages are in the log")
    _, code, _ = RawWorker(port).frame(b"\0" * 100, opcode=2).read()
    check(code in (1003, 1007), f"a binary frame: closed, {code}")
    _, code, _ = RawWorker(port).frame(b"{}", masked=False).read()
    check(code in (0, 1002), f"a frame without a mask: closed, {code}")
    _, code, _ = RawWorker(port).frame(b"\xff\xfe{}").read()
    check(code in (1007, 1008), f"text that is no UTF-8: closed, {code}")
    _, code, _ = RawWorker(port).frame(b"x" * (5 << 20)).read()
    check(code in (0, 1009), f"a message of 5 MB: closed, {code}")
    _, code, _ = RawWorker(port).frame(b"", length=1 << 62).read()
    check(code in (0, 1009, 1002), f"a message of 2^62 bytes: closed, {code}")

    texts, code, reason = RawWorker(port).say(hello("alien", protocol=99)).read()
    refusal = json.loads(texts[0]) if texts else {}
    check(refusal.get("type") == "refused" and refusal.get("is_final") and "protocol 99" in refusal.get("reason", "")
          and "alien on mars" in refusal.get("reason", ""), f"another protocol version is refused: {refusal}")
    check(logged(cluster, "alien on mars speaks protocol 99"), "and the log says so")
    texts, _, _ = RawWorker(port).say(hello("w1")).read()
    refusal = json.loads(texts[0]) if texts else {}
    check(refusal.get("type") == "refused" and "taken" in refusal.get("reason", ""), f"a taken name: {refusal}")
    texts, _, _ = RawWorker(port).say(hello("n" * 64)).read()
    check(texts and "63" in json.loads(texts[0]).get("reason", ""), "a name over the limit is refused")

    # One that is welcome and then lies about a job that is not its own.
    liar = RawWorker(port).say(hello("liar", labels={"pool": "liar"}))
    job = int(cluster.job(convoy.name)["id"].split("-")[1])
    for message in [{"type": "failed", "job": job, "generation": 1, "message": "lie", "is_fatal": True},
                    {"type": "held", "job": job, "generation": 1, "step": 3},
                    {"type": "finished", "job": job, "generation": 1, "step": 10 ** 6},
                    {"type": "progress", "job": job, "generation": 1, "steps": [{"step": 10 ** 6}]},
                    {"type": "peer_report", "job": job, "generation": 1, "peer": 1, "what": "lost"},
                    {"type": "prepared", "job": job, "number": 1, "has_state": True, "step": 10 ** 6}]:
        liar.say(message)
    time.sleep(0.3)
    liar.socket.close()
    convoy.goes_on("bad control messages")


def input_links(cluster, convoy, port):
    magic = struct.pack("<IIII", 0x31474c53, 1, 48, 0)
    for words, data in [("random bytes", NOISE.randbytes(4096)), ("a request", b"GET / HTTP/1.1\r\n\r\n" + bytes(64)),
                        ("a greeting of 4 GB", struct.pack("<IIII", 0x31474c53, 1, 0xFFFFFFFF, 0)),
                        ("a greeting of another version", struct.pack("<IIII", 0x31474c53, 99, 48, 0) + bytes(48)),
                        ("a greeting with a wrong checksum", magic + NOISE.randbytes(48)),
                        ("one byte", b"S")]:
        exchange(port, data, 1.0)
        say(f"        {words} at a worker's link port")
    check(logged(cluster, "link_refused", name="w1"), "the worker logs whom it refused")
    convoy.goes_on("bad bytes at a link port")


# ---- input: the world ------------------------------------------------------------------------------------------

def input_changed_data(cluster, convoy):
    text = ROOT / "moving.txt"
    make_text(text)
    path = pathlib.Path(job_file("moving", 20, "1", needs("moving")))
    path.write_text(path.read_text().replace(str(ROOT / "text.txt"), str(text)))
    job = cluster.submit(str(path))
    content = text.read_bytes()
    text.write_bytes(content.replace(b"horses", b"HORSES"))
    worker = cluster.start_worker("--label", "pool=moving")

    def refusals():
        return [e for e in cluster.call("GET", f"/jobs/{job}/events")["events"] if e["kind"] == "worker_refused"]

    check(until(refusals), "a worker that reads other bytes is refused for the job")
    seen = refusals()[0]["text"] if refusals() else ""
    check(str(text) in seen and worker in seen and socket.gethostname() in seen, f"with path, worker and host: {seen}")
    time.sleep(2)
    view = cluster.job(job)
    check(view["state"] == "PENDING" and view["generation"] <= 3 and len(refusals()) == 1,
          f"and asked no second time: {view['state']}, generation {view['generation']}, {len(refusals())} refusals")
    why = cluster.cli("why", job)
    check(str(text) in why.stdout, "why names the file" + ("" if str(text) in why.stdout else f": {why.stdout}"))
    text.write_bytes(content)
    cluster.start_worker("--label", "pool=moving")
    same(cluster.finish(job), 20, "with the file put right and another worker the job ends")
    convoy.goes_on("a changed data file")


def input_processes(cluster, convoy):
    state = str(cluster.folder / "state")

    def coordinator(*arguments):
        return subprocess.run([PROGRAM, "coordinator", *arguments], text=True, stdin=subprocess.DEVNULL,
                              capture_output=True, timeout=30)

    expect("a second coordinator on the same store", coordinator("--state", state, "--listen", "127.0.0.1:0"), 6,
           "held by another process", state)
    other = str(ROOT / "other-state")
    expect("a port in use", coordinator("--state", other, "--listen", f"127.0.0.1:{cluster.port}"), 6,
           str(cluster.port), "in use")
    expect("a wide port without TLS", coordinator("--state", other, "--listen", "0.0.0.0:0"), 2, "--insecure", "certs")
    expect("a token without TLS", coordinator("--state", other, "--listen", "127.0.0.1:0", "--token-file",
                                              str(ROOT / "text.txt")), 2, "token", "TLS")
    (ROOT / "a-file").write_text("x")
    expect("a state folder that is a file", coordinator("--state", str(ROOT / "a-file"), "--listen", "127.0.0.1:0"), 2,
           "a-file")
    with Mount("read-only", "1m") as folder:
        if folder is None:
            (ROOT / "locked").mkdir(mode=0o555)  # who may not mount is not root, so modes bind him
            expect("a state folder without the right to write", coordinator("--state", str(ROOT / "locked"), "--listen",
                                                                            "127.0.0.1:0"), 1, "locked", "denied")
        else:
            subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
            expect("a read-only state folder", coordinator("--state", folder, "--listen", "127.0.0.1:0"), 1, folder,
                   "Read-only")
            expect("a state folder in a read-only one", coordinator("--state", folder + "/s", "--listen",
                                                                     "127.0.0.1:0"), 1, folder, "Read-only")
    convoy.goes_on("other coordinators")


class Mount:
    """A small file system of its own; None where there is no right to mount one."""

    def __init__(self, name, size):
        self.folder = ROOT / name
        self.size = size
        self.is_mounted = False

    def __enter__(self):
        self.folder.mkdir()
        if os.geteuid() != 0 or shutil.which("mount") is None:
            return None
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={self.size}", "tmpfs", str(self.folder)],
                              capture_output=True)
        self.is_mounted = done.returncode == 0
        return str(self.folder) if self.is_mounted else None

    def __exit__(self, *_):
        if self.is_mounted:
            subprocess.run(["umount", "-l", str(self.folder)])


def fill(folder):
    with open(f"{folder}/ballast", "wb") as ballast:
        try:
            while True:
                ballast.write(bytes(65536))
                ballast.flush()
        except OSError:
            pass


def input_full_disk(cluster, convoy):
    with Mount("small", "64m") as folder:
        if folder is None:
            return say("skipped  a full disk: no right to mount a small one")
        cluster.start_worker("--label", "pool=full")
        path = job_file("full", CONVOY_STEPS, "1", needs("full"), "20 steps", keep=2)
        done = cluster.cli("submit", path, "-d", "-q", "--set", f"checkpoint.store={folder}")
        check(done.returncode == 0, f"a job with its own store: {done.stdout}{done.stderr}".strip())
        cluster.wait("full", lambda v: v["step"] >= 30 and (v.get("checkpoint") or {}).get("step", 0) >= 20)
        fill(folder)

        def events(kind):
            return [e for e in cluster.call("GET", "/jobs/full/events")["events"] if e["kind"] == kind]

        check(until(lambda: events("save_failed"), 30), "a save on a full disk fails with an event")
        said = events("save_failed")[-1]["text"] if events("save_failed") else ""
        check(folder in said and "No space left" in said, f"with the folder and the reason: {said}")
        failed = cluster.job("full")
        went_on = cluster.wait("full", lambda v: v["step"] > failed["step"] or v["state"] != "RUNNING", 20, "a further step")
        check(went_on["generation"] == 1 and went_on["state"] in ("RUNNING", "CHECKPOINTING"), "training goes on")
        saved = len(events("checkpoint_saved"))
        os.unlink(f"{folder}/ballast")
        check(until(lambda: len(events("checkpoint_saved")) > saved, 30), "with space again the next save succeeds")
        same(cluster.finish("full"), CONVOY_STEPS, "and the job ends with the golden hash")
        convoy.goes_on("a full disk")

    with Mount("small-state", "80m") as folder:
        # The coordinator's own store: it says so, takes no new work meanwhile, and training goes on.
        small = Cluster("small")
        (small.folder / "state").symlink_to(folder)
        try:
            small.start_coordinator()
            small.start_worker()
            small.submit(job_file("crowded", CONVOY_STEPS, "1", "", "20 steps"))
            small.wait_step("crowded", 30)
            fill(folder)

            # A job file of almost 1 MiB is kept with its job: the store runs out of room while it takes it.
            spec = pathlib.Path(job_file("crowd", 20, "1")).read_text() + "#" * 900_000
            answers = []

            def submit(name):
                answers.append((name, post(small.port, "/api/v1/jobs", {"yaml": spec.replace("name: crowd\n", f"name: {name}\n"),
                                                                        "file": name})[0]))

            def health():
                return http_call(small.port, "GET", "/healthz")

            for i in range(20):
                submitter = threading.Thread(target=submit, args=(f"crowd-{i}",))
                submitter.start()
                submitter.join(1)
                if submitter.is_alive() or health()[0] != 200:
                    break
            status, text = health()
            check(status == 503 and "No space left" in text and folder in text,
                  f"a full state folder: /healthz says it: {status} {str(text).strip()}")
            status, reply = post(small.port, "/api/v1/jobs/crowded/pause", {})
            check(status == 503 and "No space left" in str(reply), f"and requests are refused: {status}")
            before = small.job("crowded")["step"]
            small.wait("crowded", lambda v: v["step"] > before or v["step"] == CONVOY_STEPS, 20, "a further step")
            check(small.job("crowded")["generation"] == 1, "training goes on beside a full state folder")
            os.unlink(f"{folder}/ballast")
            check(until(lambda: http_call(small.port, "GET", "/healthz")[0] == 200, 30), "with space again it writes again")
            submitter.join(20)
            check(answers and all(code in (201, 503) for _, code in answers), f"answers meanwhile: {answers}")
            taken = [name for name, code in answers if code == 201]
            same(small.finish("crowded"), CONVOY_STEPS, "and the job ends with the golden hash")
            for name in {*taken[:1], *taken[-1:]}:
                same(small.finish(name), 20, f"{name} ends with the golden hash")
            small.kill_coordinator()
            small.start_coordinator()
            known = {j["name"] for j in small.call("GET", "/jobs?all=1")["jobs"]}
            check(known == {"crowded", *taken}, f"and after a restart each job that was answered is there: {sorted(known)}")
        finally:
            small.close()
    convoy.goes_on("a full state folder")


# ---- tls -------------------------------------------------------------------------------------------------------

class Authority:
    """A CA of `stagecoach certs` and its certificates."""

    def __init__(self, name):
        self.folder = ROOT / name
        self.run("init", str(self.folder))
        self.made = set()

    def run(self, *arguments):
        done = subprocess.run([PROGRAM, "certs", *arguments, "-q"], text=True, capture_output=True, timeout=30)
        if done.returncode != 0:
            raise RuntimeError(f"certs {arguments}: {done.stdout}{done.stderr}")

    def make(self, role, name, *more):
        if name not in self.made:
            self.run("make", str(self.folder), "--role", role, "--name", name, *more)
            self.made.add(name)
        return self.flags(name)

    def flags(self, name, ca=None):
        return ["--tls-ca", str((ca or self).folder / "ca.crt"), "--tls-cert", str(self.folder / f"{name}.crt"),
                "--tls-key", str(self.folder / f"{name}.key")]

    def identity(self, name):
        if name == "coordinator":
            return self.make("coordinator", name, "--host", "127.0.0.1")
        if name == "alice":
            return self.make("operator", name)
        return self.make("worker", name, "--host", "127.0.0.1")

    def client(self, name=None, ca=None):
        """An ssl context that shows this certificate (None: none)."""
        made = ssl.create_default_context(cafile=str((ca or self).folder / "ca.crt"))
        made.check_hostname = False
        if name is not None:
            made.load_cert_chain(self.folder / f"{name}.crt", self.folder / f"{name}.key")
        return made


def group_tls():
    ours, theirs = Authority("ours"), Authority("theirs")
    (ROOT / "token").write_text("a-token-for-eyes-only\n")
    cluster = Cluster("tls", identity=ours.identity)
    try:
        golden(CONVOY_STEPS)
        cluster.start_coordinator("--token-file", str(ROOT / "token"))
        convoy = Convoy(cluster)
        tls_workers(cluster, convoy, ours, theirs)
        tls_cli(cluster, convoy, ours, theirs)
        tls_http(cluster, convoy, ours)
        tls_links(cluster, convoy, ours, theirs)
        tls_files(cluster, ours)
        convoy.finish()
        names = sorted(w["name"] for w in cluster.call("GET", "/workers")["workers"])
        check(names == ["w1", "w2"], f"none of the refused is among the workers: {names}")
    finally:
        cluster.close()


def tls_workers(cluster, convoy, ours, theirs):
    ours.make("reader", "bob")
    ours.make("worker", "late", "--host", "127.0.0.1", "--days", "-1")
    ours.make("worker", "w9", "--host", "127.0.0.1")
    theirs.make("worker", "stranger", "--host", "127.0.0.1")
    ca_only = ["--tls-ca", str(ours.folder / "ca.crt")]
    # words, name, flags, words of one line of the coordinator's log, words of one line of its own log
    cases = [
        ("of another CA", "stranger", theirs.flags("stranger", ours), ("tls_refused", "another CA"), ("another CA",)),
        ("that has expired", "late", ours.flags("late"), ("tls_refused", "expired", "late"), ("expired",)),
        ("of an operator", "alice", ours.flags("alice"), ("request_refused", "403", "operator", "/control"), ("403",)),
        ("of a reader", "bob", ours.flags("bob"), ("request_refused", "403", "reader", "/control"), ("403",)),
        ("of another worker", "w8", ours.flags("w9"), ("worker_refused", "w8", "certificate of w9"), ("w9",)),
        ("that trusts another CA", "stranger", theirs.flags("stranger"), ("tls_refused",), ("another CA",)),
        ("of nobody, and no TLS", "plain", [], ("tls_refused", "plain HTTP"), None),
    ]
    own = subprocess.run([PROGRAM, "worker", "--coordinator", f"127.0.0.1:{cluster.port}", "--name", "nobody", *ca_only],
                         text=True, stdin=subprocess.DEVNULL, capture_output=True, timeout=30)
    expect("a worker with a CA and no certificate does not start", own, 2, "certificate and key")
    peer = RawWorker(cluster.port, lambda s: ours.client().wrap_socket(s))
    peer.socket.close()
    check(peer.status == 401, f"/control without a certificate: {peer.status}")
    check(logged(cluster, "request_refused", "401", "/control", "no certificate shown"), "    and the log says so")
    processes = []
    for i, (words, name, flags, _, _) in enumerate(cases):
        processes.append(cluster.spawn(f"bad{i}", ["worker", "--coordinator", f"127.0.0.1:{cluster.port}", "--name", name,
                                                   "--threads", "1", *flags]))
    try:
        for i, (words, name, flags, coordinators, own) in enumerate(cases):
            check(logged(cluster, *coordinators), f"a worker with the certificate {words} is refused, and the log says so")
            if own is not None:
                check(logged(cluster, *own, name=f"bad{i}"), "    and so does its own")
        check(until(lambda: processes[4].poll() is not None), "a worker under another's name gives up")
        check(processes[4].returncode == 9, f"    with exit 9: {processes[4].returncode}")
        convoy.goes_on("workers with wrong certificates")
    finally:
        for process in processes:
            process.kill()
            process.wait()


def tls_cli(cluster, convoy, ours, theirs):
    theirs.make("operator", "mallory")
    ours.make("operator", "old", "--days", "-1")
    ca_only = ["--tls-ca", str(ours.folder / "ca.crt")]

    def cli(flags, *arguments):
        return subprocess.run([PROGRAM, *arguments, "--coordinator", f"127.0.0.1:{cluster.port}", *flags], text=True,
                              stdin=subprocess.DEVNULL, capture_output=True, timeout=60)

    token = [*ca_only, "--token", "a-token-for-eyes-only"]
    expect("an operator may look", cluster.cli("status", convoy.name), 0, convoy.name)
    expect("a reader may look", cli(ours.flags("bob"), "status", convoy.name), 0, convoy.name)
    expect("a reader may not cancel", cli(ours.flags("bob"), "cancel", convoy.name), 9, "reader", "operator")
    expect("the token may look", cli(token, "status", convoy.name), 0, convoy.name)
    expect("the token may not pause", cli(token, "pause", convoy.name), 9, "token", "operator")
    expect("a wrong token", cli([*ca_only, "--token", "a-token-for-eyes-onlx"], "jobs"), 9, "wrong bearer token")
    expect("neither certificate nor token", cli(ca_only, "jobs"), 9, "no certificate shown")
    expect("a worker's certificate", cli(ours.flags("w1"), "jobs"), 9, "worker", "operator")
    expect("a certificate of another CA", cli(theirs.flags("mallory", ours), "jobs"), 9, "TLS")
    expect("an expired certificate", cli(ours.flags("old"), "jobs"), 9, "TLS")
    expect("trust in another CA", cli(theirs.flags("mallory"), "jobs"), 9, "another CA")
    expect("no TLS at all", cli([], "jobs"), 4, "certificates")
    convoy.goes_on("commands without a right")


def tls_http(cluster, convoy, ours):
    def call(context, method, path, **headers):
        request = urllib.request.Request(f"https://127.0.0.1:{cluster.port}{path}", method=method,
                                         data=b"{}" if method == "POST" else None,
                                         headers={"Content-Type": "application/json", **headers})
        try:
            with urllib.request.urlopen(request, timeout=10, context=context) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as refusal:
            return refusal.code, refusal.read().decode()

    bare, reader, operator = ours.client(), ours.client("bob"), ours.client("alice")
    token = {"Authorization": "Bearer a-token-for-eyes-only"}
    status, text = call(bare, "GET", "/metrics", **token)
    check(status == 200 and "stagecoach_" in text, f"metrics with the token: {status}")
    check(call(bare, "GET", "/metrics")[0] == 401, "metrics without it: 401")
    check(call(bare, "GET", "/api/v1/jobs", **token)[0] == 200, "GET with the token: 200")
    check(call(bare, "POST", f"/api/v1/jobs/{convoy.name}/cancel", **token)[0] == 403, "POST with the token: 403")
    check(call(reader, "GET", "/api/v1/jobs")[0] == 200, "GET of a reader: 200")
    check(call(reader, "POST", f"/api/v1/jobs/{convoy.name}/cancel")[0] == 403, "POST of a reader: 403")
    check(call(operator, "POST", f"/api/v1/jobs/{convoy.name}/save")[0] == 202, "POST of an operator: 202")
    check(call(operator, "POST", f"/api/v1/jobs/{convoy.name}/cancel", Origin="https://evil.example")[0] == 403,
          "POST of an operator's browser from another site: 403")
    got = exchange(cluster.port, b"GET /api/v1/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 2)
    check(b"HTTP" not in got and b"job" not in got, f"plain HTTP at the TLS port gets no word: {got[:20]}")
    old = ours.client("alice")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    old.set_ciphers("ALL:@SECLEVEL=0")
    check(refused_tls(cluster.port, old), "TLS 1.1 is refused")
    for name, role in [("alice", "operator"), ("bob", "reader")]:
        peer = RawWorker(cluster.port, lambda s, name=name: ours.client(name).wrap_socket(s))
        check(peer.status == 403, f"/control with the certificate of role {role}: {peer.status}")
        peer.socket.close()
    convoy.goes_on("HTTP without a right")


def refused_tls(port, context, data=b""):
    """True when the handshake fails, or the first read after it brings nothing."""
    s = connect(port)
    s.settimeout(3)
    try:
        with context.wrap_socket(s) as wrapped:
            if data:
                wrapped.sendall(data)
            return wrapped.recv(100) == b""
    except (OSError, ValueError):
        return True
    finally:
        s.close()


def tls_links(cluster, convoy, ours, theirs):
    port = link_port_of(cluster, "w1")
    greeting = struct.pack("<IIII", 0x31474c53, 1, 48, 0)
    got = exchange(port, greeting + bytes(48), 2)
    check(got == b"" or got[0] == 0x15, f"a plain greeting at a link port gets nothing but an alert: {got[:20]}")
    check(refused_tls(port, ours.client()), "a link without a certificate is refused")
    check(refused_tls(port, theirs.client("stranger", ours)), "a link with a certificate of another CA is refused")
    check(refused_tls(port, ours.client("late")), "a link with an expired certificate is refused")
    with ours.client("alice").wrap_socket(connect(port)) as link:
        link.settimeout(3)
        link.sendall(greeting)
        verdict = link.recv(100)
    check(len(verdict) == 16 and verdict[:4] == b"SLR1", f"a link of an operator is told that its role is wrong: {verdict}")
    for words in (("another CA",), ("expired", "late"), ("'alice' has role 'operator'",)):
        check(logged(cluster, "link_refused", *words, name="w1"), f"    the worker's log: {' '.join(words)}")
    convoy.goes_on("links with wrong certificates")


def tls_files(cluster, ours):
    def coordinator(*flags):
        return subprocess.run([PROGRAM, "coordinator", "--state", str(ROOT / "unused"), "--listen", "127.0.0.1:0", *flags],
                              text=True, stdin=subprocess.DEVNULL, capture_output=True, timeout=30)

    good = ours.flags("coordinator")
    expect("a certificate file that is not there", coordinator(*good[:3], "nowhere.crt", *good[4:]), 5, "nowhere.crt")
    expect("a key of another certificate", coordinator(*good[:5], str(ours.folder / "w1.key")), 3, "key")
    expect("a certificate without a key", coordinator(*good[:4]), 2, "key")


if __name__ == "__main__":
    sys.exit(main({"input": group_input, "tls": group_tls}))
