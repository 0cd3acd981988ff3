"""Hosts of a script's own: a network namespace each, on a bridge that nobody else sees. Cuts and slow links are real.

enter() starts the script again inside a namespace of its own, as root or as the root of a user namespace, so nothing of
the machine's network is touched; all of it goes with the last process. A host stays when its worker is killed (its
kernel still refuses the port, as a real host's would) and goes when the host is lost.
"""
import os
import shutil
import subprocess
import sys

import live_cluster

INSIDE = "STAGECOACH_PRIVATE_NETWORK"
PROBE = ("ip link add name br9 type bridge && ip link add name vp1 type veth peer name vp2 && ip link set vp2 up && "
         "tc qdisc add dev vp2 root tbf rate 1mbit burst 32k latency 400ms && mount -t tmpfs none /mnt")


def enter():
    """Does not return where namespaces can be had, the first time; later True. False: this machine gives none."""
    if os.environ.pop(INSIDE, ""):
        return True
    if not all(shutil.which(tool) for tool in ("unshare", "nsenter", "ip", "tc", "ss")):
        return False
    flags = ["--net", "--mount"] + ([] if os.geteuid() == 0 else ["--map-root-user"])
    probe = subprocess.run(["unshare", *flags, "--", "sh", "-c", PROBE], capture_output=True)
    if probe.returncode != 0:
        return False
    os.environ[INSIDE] = "1"
    os.execvp("unshare", ["unshare", *flags, "--", sys.executable, *sys.argv])


def command(*words, within=None):
    under = [] if within is None else ["nsenter", f"--net=/proc/{within.holder.pid}/ns/net", "--"]
    done = subprocess.run([*under, *words], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


class Network:
    def __init__(self):
        self.hosts = {}
        self.made = 0
        command("ip", "link", "set", "lo", "up")
        command("ip", "link", "add", "name", "hub", "type", "bridge")
        command("ip", "link", "set", "hub", "up")
        command("ip", "addr", "add", "10.77.0.1/16", "dev", "hub")

    def add(self, name):
        self.made += 1
        self.hosts[name] = Host(self.made, name)
        return self.hosts[name]

    def lose(self, name):
        """As a power cut: no packet leaves any more, then everything on it is gone. The caller kills its processes."""
        self.hosts.pop(name).go()

    def cut(self, a, b):
        """Packets between two hosts vanish, both ways; all other pairs still talk."""
        for here, there in ((a, b), (b, a)):
            here.aim(there, "02:00:00:ff:ff:ff")

    def mend(self, a, b):
        for here, there in ((a, b), (b, a)):
            here.aim(there, there.mac)

    def close(self):
        for name in list(self.hosts):
            self.lose(name)


class Host:
    def __init__(self, number, name):
        self.name = name
        self.address = f"10.77.{number // 200 + 1}.{number % 200 + 1}"
        self.mac = f"02:00:00:00:{number // 256:02x}:{number % 256:02x}"
        self.plug = f"h{number}"
        self.holder = subprocess.Popen(["unshare", "--net", "--", "sh", "-c", "echo up; exec sleep 1000000"],
                                       stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                       preexec_fn=live_cluster.die_with_parent)
        self.holder.stdout.readline()
        command("ip", "link", "add", "name", self.plug, "type", "veth", "peer", "name", self.plug + "p")
        command("ip", "link", "set", self.plug + "p", "netns", str(self.holder.pid))
        command("ip", "link", "set", self.plug, "master", "hub", "up")
        command("sh", "-c", f"ip link set lo up && ip link set {self.plug}p name eth0 address {self.mac} && "
                            f"ip addr add {self.address}/16 dev eth0 && ip link set eth0 up", within=self)

    def under(self):
        return ["nsenter", f"--net=/proc/{self.holder.pid}/ns/net", "--"]

    def aim(self, there, mac):
        command("ip", "neigh", "replace", there.address, "lladdr", mac, "dev", "eth0", "nud", "permanent", within=self)

    def unplug(self):
        command("ip", "link", "set", self.plug, "nomaster")

    def plug_in(self):
        command("ip", "link", "set", self.plug, "master", "hub")

    def slow_down(self, mbit):
        """Both directions share no bucket; the queue holds 50 ms, what is more is dropped."""
        shape = ["root", "tbf", "rate", f"{mbit}mbit", "burst", "32k", "latency", "50ms"]
        command("tc", "qdisc", "replace", "dev", self.plug, *shape)
        command("tc", "qdisc", "replace", "dev", "eth0", *shape, within=self)

    def speed_up(self):
        command("tc", "qdisc", "del", "dev", self.plug, "root")
        command("tc", "qdisc", "del", "dev", "eth0", "root", within=self)

    def reset(self, there):
        """Breaks every connection to another host at once; both ends see it."""
        command("ss", "-K", "dst", there.address, within=self)

    def go(self):
        if self.holder.poll() is None:
            self.holder.kill()
        self.holder.wait()
        self.holder.stdout.close()
