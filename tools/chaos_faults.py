"""The faults of tools/chaos: which come when (from the seed alone), and how each is done to a real cluster.

A fault begins, lasts `hold_s`, and ends; some end by themselves at once. Nothing here corrupts what the design calls
unrecoverable: no disk is damaged, and the coordinator's state folder always comes back whole.
"""
import contextlib
import dataclasses
import random
import signal

import live_cluster

# kind: (weight, shortest and longest hold in seconds, what it needs, what it is)
KINDS = {
    "kill": (14, (0.0, 1.5), "", "kill -9 a member; another worker starts after the hold"),
    "kill_two": (4, (0.0, 1.5), "", "kill -9 two members at once; two others start after the hold"),
    "leave": (5, (0.0, 0.0), "", "SIGTERM to a worker, which says goodbye; one fewer from here on"),
    "attach": (8, (0.0, 0.0), "", "one more worker"),
    "drain": (7, (0.5, 2.5), "", "drain a member, undrain it after the hold"),
    "pause": (2, (0.2, 1.0), "", "pause the job, resume it after the hold"),
    "freeze_short": (8, (0.1, 0.6), "", "SIGSTOP a member, SIGCONT after the hold: shorter than a suspicion"),
    "freeze_long": (5, (3.0, 8.0), "", "SIGSTOP a member, SIGCONT after the hold"),
    "coordinator_kill": (8, (0.3, 3.0), "", "kill -9 the coordinator, start it again after the hold"),
    "coordinator_and_worker_kill": (6, (0.5, 6.0), "", "kill -9 the coordinator, then a member; the coordinator "
                                    "starts again after the hold"),
    "coordinator_freeze": (4, (0.5, 4.0), "", "SIGSTOP the coordinator, SIGCONT after the hold"),
    "control_reset": (6, (0.0, 0.0), "door", "break a worker's connection to the coordinator"),
    "control_cut": (5, (0.5, 5.0), "door", "no byte passes between a worker and the coordinator during the hold"),
    "link_reset": (6, (0.0, 0.0), "network", "break the links between two members"),
    "link_cut": (5, (0.3, 5.0), "network", "no packet passes between two members during the hold"),
    "host_cut": (5, (0.3, 5.0), "network", "no packet passes between one host and all others during the hold"),
    "host_slow": (5, (1.0, 4.0), "network", "2 Mbit/s to and from one host during the hold"),
    "host_loss": (5, (0.0, 1.5), "network", "a host with its worker vanishes without a word; another comes after the "
                  "hold"),
    "disk_full": (4, (1.0, 4.0), "disk", "the checkpoint folder is full during the hold"),
}


@dataclasses.dataclass(frozen=True)
class Fault:
    number: int
    kind: str
    calm_s: float      # undisturbed time before it
    hold_s: float
    aim: tuple         # two numbers in [0, 1): who it hits, among those that are there then
    overlaps: bool     # the next one comes before this one is recovered


def schedule(seed, workers, means, kinds=None, calm_s=1.0, overlap=0.15):
    """Endless. means: what the place offers ("door", "network", "disk"); workers: the most that are attached."""
    source = random.Random(f"stagecoach chaos {seed}")
    names = [k for k in KINDS if KINDS[k][2] in ("", *means) and (not kinds or k in kinds)]
    weights = [KINDS[k][0] for k in names]
    count, number = workers, 0
    while True:
        number += 1
        kind = source.choices(names, weights)[0]
        calm, hold, aim = source.expovariate(1 / calm_s), source.uniform(*KINDS[kind][1]), (source.random(),
                                                                                            source.random())
        overlaps = source.random() < overlap
        # The number of workers is the schedule's, not the cluster's, so that it depends on the seed alone.
        if kind == "leave" and count <= 2 or kind == "attach" and count >= workers:
            kind = {"leave": "attach", "attach": "leave"}[kind]
            if kinds and kind not in kinds:
                continue
        count += {"leave": -1, "attach": 1}.get(kind, 0)
        yield Fault(number, kind, min(calm, 4 * calm_s), hold, aim, overlaps)


class Field(live_cluster.Cluster):
    """A cluster in which each worker has a host of its own, if there is a network; else all are on loopback."""

    def __init__(self, program, folder, environment, network=None, door_type=None):
        super().__init__(program, folder, environment)
        self.network, self.door_type = network, door_type
        self.place_of, self.doors = {}, {}
        self.frozen = set()
        self.leaving = {}  # were asked to go: name to process
        self.owed = []     # requests that undo a fault and were not accepted yet
        if network:
            self.host = network.add("coordinator").address

    # ---- who runs where
    def place(self, name):
        if not self.network:
            return [], []
        if name == "coordinator":
            return self.network.hosts[name].under(), ["--insecure"]
        here = self.network.hosts[self.place_of[name]]
        return here.under(), ["--link-host", here.address, "--insecure"]

    def start_worker(self, *more):
        name = f"w{self.count + 1}"
        if self.network:
            taken = {self.place_of[w] for w in self.workers}
            free = [h for h in self.network.hosts if h != "coordinator" and h not in taken]
            self.place_of[name] = free[0] if free else self.network.add(f"host{self.network.made}").name
        elif self.door_type:
            self.doors[name] = self.door_type(self.port)
        return super().start_worker(*more)

    def way_from(self, name):
        return f"127.0.0.1:{self.doors[name].port}" if name in self.doors else super().way_from(name)

    def forget(self, name):
        process = self.workers.pop(name, None)
        if process is not None:
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()
        self.frozen.discard(name)
        if door := self.doors.pop(name, None):
            door.close()

    def host_of(self, name):
        return self.network.hosts[self.place_of[name]]

    def close(self):
        super().close()
        for door in self.doors.values():
            door.close()
        if self.network:
            self.network.close()


class Strike:
    """One fault done to a field. begin() -> who was hit, or None: nobody to hit now; end() undoes what lasts."""

    def __init__(self, field, fault, view, job):
        self.field, self.fault, self.job = field, fault, job
        self.undo = []
        here = [m["name"] for m in (view.get("plan") or {}).get("members", []) if m["name"] in field.workers]
        self.members = [name for name in here if name not in field.frozen] or here
        self.target = ""

    def begin(self):
        return getattr(self, self.fault.kind)()

    def end(self):
        for undo in self.undo:
            undo()

    def pick(self, names, which=0):
        return names[int(self.fault.aim[which] * len(names))] if names else None

    def pair(self):
        """Two members, or None."""
        first = self.pick(self.members)
        return (first, self.pick([m for m in self.members if m != first], 1)) if len(self.members) > 1 else None

    # ---- workers
    def kill(self, count=1):
        victims = [v for v in (self.pair() or self.members[:1])[:count]]
        for name in victims:  # both signals before the first wait
            self.field.workers[name].kill()
        for name in victims:
            self.field.forget(name)
            self.undo.append(self.field.start_worker)
        return " ".join(victims) or None

    def kill_two(self):
        return self.kill(2)

    def leave(self):
        name = self.pick(sorted(set(self.field.workers) - self.field.frozen) or sorted(self.field.workers))
        if name is None:
            return None
        process = self.field.workers.pop(name)
        process.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGTERM)
        self.field.leaving[name] = process
        self.field.frozen.discard(name)
        return name

    def attach(self):
        return self.field.start_worker()

    def drain(self):
        name = self.pick(self.members)
        if name is None or not self.ask(f"/workers/{name}/drain", {"reason": "chaos"}):
            return None
        self.undo.append(lambda: name in self.field.workers and self.insist(f"/workers/{name}/undrain"))
        return name

    def pause(self):
        if not self.ask(f"/jobs/{self.job}/pause"):
            return None
        self.undo.append(lambda: self.insist(f"/jobs/{self.job}/resume"))
        return "job"

    def freeze_short(self):
        name = self.pick(self.members)
        if name is None:
            return None
        self.field.kill(name, signal.SIGSTOP)
        self.field.frozen.add(name)

        def thaw():
            if name in self.field.workers:
                self.field.kill(name, signal.SIGCONT)
            self.field.frozen.discard(name)
        self.undo.append(thaw)
        return name

    freeze_long = freeze_short

    # ---- the coordinator
    def coordinator_kill(self):
        if self.field.coordinator.poll() is not None:
            return None
        self.field.kill_coordinator()
        self.undo.append(self.field.start_coordinator)
        return "coordinator"

    def coordinator_and_worker_kill(self):
        if self.coordinator_kill() is None:
            return None
        name = self.pick(self.members)
        if name is not None:
            self.field.forget(name)
            self.undo.append(self.field.start_worker)
        return f"coordinator {name}"

    def coordinator_freeze(self):
        process = self.field.coordinator
        if process.poll() is not None:
            return None
        process.send_signal(signal.SIGSTOP)
        self.undo.append(lambda: process.send_signal(signal.SIGCONT))
        return "coordinator"

    # ---- connections
    def control_reset(self):
        name = self.pick(sorted(self.field.workers))
        if name is None:
            return None
        if self.field.network:
            self.field.host_of(name).reset(self.field.network.hosts["coordinator"])
        else:
            self.field.doors[name].shut()
        return name

    def control_cut(self):
        name = self.pick(sorted(self.field.workers))
        if name is None:
            return None
        if self.field.network:
            return self.cut(self.field.host_of(name), self.field.network.hosts["coordinator"]) and name
        door = self.field.doors[name]
        door.hold()
        self.undo.append(door.release)
        return name

    def link_reset(self):
        two = self.pair()
        if two is None:
            return None
        self.field.host_of(two[0]).reset(self.field.host_of(two[1]))
        return " ".join(two)

    def link_cut(self):
        two = self.pair()
        if two is None:
            return None
        self.cut(self.field.host_of(two[0]), self.field.host_of(two[1]))
        return " ".join(two)

    def cut(self, a, b):
        self.field.network.cut(a, b)
        # The other may be gone by then, in a fault that overlaps.
        self.undo.append(lambda: {a, b} <= set(self.field.network.hosts.values()) and self.field.network.mend(a, b))
        return True

    def host_cut(self):
        return self.on_host(lambda h: h.unplug(), lambda h: h.plug_in())

    def host_slow(self):
        return self.on_host(lambda h: h.slow_down(2), lambda h: h.speed_up())

    def on_host(self, do, undo):
        name = self.pick(self.members)
        if name is None:
            return None
        host = self.field.host_of(name)
        do(host)

        def mend():
            if host in self.field.network.hosts.values():
                with contextlib.suppress(RuntimeError):  # an overlapping fault of one kind mended it already
                    undo(host)
        self.undo.append(mend)
        return name

    def host_loss(self):
        name = self.pick(self.members)
        if name is None:
            return None
        host = self.field.host_of(name)
        host.unplug()  # first, so that no packet tells of the death
        self.field.forget(name)
        self.field.network.lose(host.name)
        self.undo.append(self.field.start_worker)
        return name

    # ---- disks
    def disk_full(self):
        if not self.field.has_small_disk:
            self.field.checkpoints.chmod(0o555)
            self.undo.append(lambda: self.field.checkpoints.chmod(0o755))
            return "checkpoint folder"
        filler = self.field.checkpoints / "filler"
        if filler.exists():
            return None
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            for size in (1 << 20, 1 << 12):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(b"\0" * size)
        self.undo.append(filler.unlink)
        return "checkpoint folder"

    # ---- the API
    def ask(self, path, body=None):
        try:
            self.field.call("POST", path, body or {}, seconds=3)
            return True
        except OSError:
            return False

    def insist(self, path):
        """Wanted for certain: tried until it is accepted (the coordinator may be away), by the caller's loop."""
        if not self.ask(path):
            self.field.owed.append(path)
