#!/usr/bin/env python3
"""The doors between the rooms (DESIGN section 2), read from the #include lines.

usage: check_doors.py [ROOT]     the repository that it stands in, if none is named
Fails, naming file and line, when a file includes a room that its own room may not enter, when a
decision file includes a library that touches the world, or when CAF, Beast or CUDA headers stand outside
the few files that may have them.
"""
import pathlib
import re
import sys

ROOMS = {
    "config": set(),
    "kernels": {"config"},
    "storage": {"config"},
    "model": {"config", "kernels"},
    "coordinator": {"config", "storage"},
    "worker": {"config", "kernels", "storage", "model"},
    "tools": {"config", "kernels", "storage", "model", "coordinator", "worker"},
}
# Single headers that a room may take from a room it may not enter otherwise.
HEADERS = {
    "coordinator": {"model/plan.hpp", "model/copies.hpp", "model/schedule.hpp", "model/leaf_tree.hpp",
                    "model/leaf_shares.hpp", "model/layer_shares.hpp", "model/tensor_names.hpp"},
    # A deputy stands in for the coordinator: it runs the coordinator's own job_machine on its records, writes
    # manifests by its checkpoint_keeper on a thread of its own, and speaks by its field lists.
    "worker": {"coordinator/messages.hpp", "coordinator/wire.hpp", "coordinator/wire_fields.hpp",
               "coordinator/job_machine.hpp", "coordinator/records.hpp", "coordinator/checkpoint_keeper.hpp",
               "coordinator/serial_thread.hpp"},
}
# Files that decide: no clock, thread, socket, disk, random, unordered walk; no library of the world.
DECISION = re.compile(
    r"(^|/)(\w+_machine|plan|copies|schedule|leaf_tree|leaf_shares|layer_shares|tensor_names|messages|records|vote)\.(hpp|cpp)$")
WORLD = re.compile(
    r"^(caf/|rocksdb/|boost/|openssl/|cuda|nccl|sys/|netinet/|unistd\.h|thread$|mutex$|chrono$|random$|fstream$"
    r"|filesystem$|unordered_map$|unordered_set$|condition_variable$|future$|atomic$|ctime$|time\.h)")
CAF_ONLY = re.compile(r"(_actor\.cpp|_actor_test\.cpp)$")
BEAST_ONLY = re.compile(r"_(beast|asio)(_impl)?\.cpp$|asio_impl\.cpp$|beast_impl\.cpp$|_test\.cpp$|(byte_stream_beast|connection_asio|link_upgrade_asio)\.hpp$")
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^">]+)[">]')


def problems(root):
    for room in list(ROOMS) + ["tests"]:
        for path in sorted((root / room).rglob("*")):
            if path.suffix not in (".hpp", ".cpp", ".cu", ".cuh"):
                continue
            name = path.relative_to(root).as_posix()
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                match = INCLUDE.match(line)
                if not match:
                    continue
                quoted, header = match.group(1) == '"', match.group(2)
                where = f"{name}:{number}: "
                target = header.split("/")[0]
                if quoted and target == "tests" and room != "tests":
                    yield where + f'"{header}": no room may enter tests/'
                if quoted and room in ROOMS and target in ROOMS and target != room:
                    if target not in ROOMS[room] and header not in HEADERS.get(room, ()):
                        yield where + f'"{header}": {room}/ may not enter {target}/'
                if room == "worker" and quoted and target == "coordinator" and header not in HEADERS["worker"]:
                    yield where + f'"{header}": worker/ may take only what check_doors.py lists'
                if room in ROOMS and DECISION.search(name) and not quoted and WORLD.match(header):
                    yield where + f"<{header}>: a decision file touches the world"
                if header.startswith("caf/") and not CAF_ONLY.search(name):
                    yield where + f"<{header}>: CAF belongs in *_actor.cpp files"
                if header.startswith(("boost/beast", "boost/asio")) and not BEAST_ONLY.search(name):
                    yield where + f"<{header}>: Asio and Beast belong in *_asio.cpp and *_beast.cpp files"


def main():
    if len(sys.argv) > 2:
        print(__doc__, file=sys.stderr)
        return 2
    own = pathlib.Path(__file__).resolve().parent.parent
    found = list(problems(pathlib.Path(sys.argv[1]) if len(sys.argv) == 2 else own))
    for problem in found:
        print(problem)
    print(f"doors: {len(found)} broken" if found else "doors: all kept")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
