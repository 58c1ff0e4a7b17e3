"""Programs do their work in the sandbox, and none gets out, stays, or takes more than it was given."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from helpers import ROOT
from kdcache.errors import KDError
from kdcache.judge import sandbox as sandbox_module
from kdcache.judge.sandbox import Sandbox, program, seccomp, walls
from kdcache.judge.sandbox.limits import Limits
from kdcache.judge.sandbox.pool import side_by_side
from kdcache.progress import Progress

SMALL = Limits(wall_seconds=3.0, cpu_seconds=1, memory_mb=128, processes=8, output_bytes=65_536, file_bytes=8 << 20)
CPP = "#include <bits/stdc++.h>\nusing namespace std;\nint main() { %s }\n"


def said_by(outcome):
    assert outcome.status == "ok", outcome
    return json.loads(outcome.stdout)


def is_running(marker):
    """Whether a process of the machine has ``marker`` in its command line, after a moment's grace."""
    for _ in range(50):
        has_marker = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                has_marker.append(marker.encode() in path.read_bytes())
            except OSError:
                continue
        if not any(has_marker):
            return False
        time.sleep(0.05)
    return True


# --- work -------------------------------------------------------------------------------------------------------------


def test_a_python_program_reads_its_input_and_prints(sandbox):
    outcome = sandbox.run("python", "import math\nprint(math.comb(int(input()), 2), 'año')", "5\n")
    assert (outcome.status, outcome.stdout, outcome.exit_code) == ("ok", "10 año\n", 0)


def test_cpp_is_compiled_once_for_all_its_inputs(sandbox, monkeypatch):
    program = CPP % "long long a; cin >> a; cout << a * a;"
    assert sandbox.run("cpp", program, "3").stdout == "9"
    monkeypatch.setattr(sandbox_module, "COMPILER_LIMITS", None)  # another compilation would break
    assert sandbox.run("cpp", program, "1000000").stdout == "1000000000000"


def test_cpp_that_does_not_compile_says_where(sandbox):
    outcome = sandbox.run("cpp", CPP % "retrun 0;")
    assert outcome.status == "compile" and "retrun" in outcome.stderr


@pytest.mark.parametrize(
    ("program", "status", "code"),
    [
        ("raise SystemExit(3)", "error", 3),
        ("1 / 0", "error", 1),
        ("import os; os.kill(os.getpid(), 11)", "error", 139),
        ("def", "error", 1),
    ],
)
def test_a_program_that_fails_has_an_exit_code(sandbox, program, status, code):
    outcome = sandbox.run("python", program)
    assert (outcome.status, outcome.exit_code) == (status, code)


def test_input_that_is_never_read_and_large_input_are_no_matter(sandbox):
    large = "x" * 5_000_000
    assert sandbox.run("python", "print('done')", large).stdout == "done\n"
    assert sandbox.run("python", "import sys; print(len(sys.stdin.read()))", large).stdout == "5000000\n"


def test_deep_recursion_and_a_thread_with_a_large_stack_work(sandbox):
    deep = "import sys; sys.setrecursionlimit(10**6)\ndef f(n): return n and f(n - 1)\n"
    threaded = "import threading; threading.stack_size(1 << 27)\nt = threading.Thread(target=f, args=(10**5,))\n"
    assert sandbox.run("python", deep + threaded + "t.start(); t.join(); print('done')").stdout == "done\n"
    recursive = "#include <cstdio>\nint f(int n) { volatile int a[8]; a[0] = n; return n ? f(n - 1) + a[0] % 2 : 0; }\n"
    assert sandbox.run("cpp", recursive + 'int main() { printf("%d", f(1000000)); }').stdout == "500000"


def test_files_are_the_arguments_of_a_program(sandbox):
    program = "import sys\nprint([open(path).read() for path in sys.argv[1:]])"
    assert sandbox.run("python", program, files={"a": "1", "b": "ñ"}).stdout == "['1', 'ñ']\n"


def test_input_and_output_have_names(sandbox):
    program = (
        "text = open('/dev/stdin').read()\nopen('/dev/stdout', 'w').write(text)\nopen('/dev/stderr', 'w').write('e')"
    )
    outcome = sandbox.run("python", program, "hello")
    assert (outcome.stdout, outcome.stderr) == ("hello", "e")
    body = 'ifstream given("/dev/stdin"); string word; given >> word; ofstream("/dev/stdout") << word;'
    assert sandbox.run("cpp", CPP % body, "hello").stdout == "hello"


def test_cpp_of_any_standard_since_17_compiles_and_knows_its_judge(sandbox):
    newer = "#include <cstdio>\n#include <numbers>\nauto f(auto x) requires true { return x; }\n#ifdef ONLINE_JUDGE\n"
    assert sandbox.run("cpp", newer + 'int main() { printf("%d", f(int(std::numbers::pi))); }\n#endif').stdout == "3"
    older = '#include <cstdio>\nint main() { int requires = 2; printf("%d", requires); }'
    assert sandbox.run("cpp", older).stdout == "2"


def test_of_a_flood_on_stderr_the_end_is_kept_and_no_limit_is_exceeded(sandbox):
    outcome = sandbox.run("python", "import sys\nsys.stderr.write('x' * 3_000_000 + 'end')\nprint('done')")
    assert (outcome.status, outcome.stdout) == ("ok", "done\n")
    assert len(outcome.stderr) == program.STDERR_KEPT_BYTES and outcome.stderr.endswith("end")


def test_the_same_run_is_not_run_again(sandbox):
    program = "import time; print(time.time_ns())"
    first = sandbox.run("python", program)
    assert sandbox.run("python", program) is first
    assert sandbox.run("python", program, "other input").stdout != first.stdout


def test_many_programs_run_side_by_side_and_answer_in_order(sandbox):
    shown = []
    results = side_by_side(lambda n: sandbox.run("python", f"print({n})").stdout, range(12), 3, shown.append)
    assert results == [f"{n}\n" for n in range(12)] and shown[-1] == Progress(12, 12, "programs") and len(shown) == 12


# --- no way out -------------------------------------------------------------------------------------------------------


def test_no_socket_reaches_anything(sandbox, tmp_path):
    program = """
import json, socket, sys
reached = []
targets = json.loads(input())
for family, address in [(socket.AF_INET, ("127.0.0.1", targets["port"])), (socket.AF_INET, ("1.1.1.1", 53)),
        (socket.AF_UNIX, targets["abstract"]), (socket.AF_UNIX, targets["path"]), (40, (2, 1024)), (16, (0, 0))]:
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW):
        try:
            with socket.socket(family, kind) as client:
                client.settimeout(0.2)
                client.connect(address)
                reached.append(str(address))
        except OSError:
            pass
print(json.dumps(reached))
"""
    abstract = f"\0kdcache-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as a, socket.socket(1) as b:
        a.bind(abstract)
        b.bind(str(tmp_path / "socket"))
        a.listen()
        b.listen()
        targets = {"port": tcp.getsockname()[1], "abstract": abstract, "path": str(tmp_path / "socket")}
        assert said_by(sandbox.run("python", program, json.dumps(targets))) == []
        assert len(said_by(Sandbox(unsafe=True).run("python", program, json.dumps(targets)))) >= 3  # it can tell


def test_neither_home_nor_environment_nor_a_file_of_the_machine_can_be_read(sandbox, tmp_path, monkeypatch):
    monkeypatch.setenv("KD_TOKEN", "sesame")
    (tmp_path / "secret").write_text("sesame")
    program = """
import glob, json, os, sys
found = []
def look(path):
    try:
        text = open(path, "rb").read(100_000)
    except OSError:
        return
    found.append(path) if b"sesame" in text else None
home, secret = json.loads(input())
for path in [secret, "/proc/1/root" + secret, "/proc/self/root/.." + secret, "/tmp/../.." + secret, "/oldroot" + secret]:
    look(path)
for path in glob.glob("/proc/*/environ") + glob.glob("/proc/*/task/*/environ") + glob.glob("/proc/*/cmdline"):
    look(path)
os.symlink(secret, "link")
look("link")
for number in range(3, 256):
    look(f"/proc/self/fd/{number}")
    look(f"/proc/1/fd/{number}")
for folder in (home, "/root", "/etc/ssh", "/var", "/run", "/sys", "/mnt", "/proc/1/root/home"):
    try:
        # The interpreter may lie below the home: its folder is there, with nothing beside it.
        found += [f"{folder}/{name}" for name in os.listdir(folder) if f"{folder}/{name}/" not in sys.base_prefix + "/"]
    except OSError:
        pass
for path in ("/etc/passwd", "/etc/shadow", "/etc/hostname", "/proc/kcore", "/dev/mem", "/dev/kmsg", "/dev/sda"):
    found += [path] if os.access(path, os.R_OK) and path != "/proc/kcore" else []
found += [name for name in os.environ if name not in ("PATH", "HOME", "TMPDIR", "LANG", "PWD", "LC_CTYPE")]
found += ["sesame"] if "sesame" in str(os.environ) else []
print(json.dumps(found))
"""
    given = [str(Path.home()), str(tmp_path / "secret")]
    assert said_by(sandbox.run("python", program, json.dumps(given))) == []
    assert given[1] in said_by(Sandbox(unsafe=True).run("python", program, json.dumps(given)))  # it can tell


def test_only_its_own_tmp_can_be_written_and_that_is_gone_afterwards(sandbox, tmp_path):
    program = """
import json, os
written = []
for folder in json.loads(input()) + ["/", "/usr", "/usr/bin", "/etc", "/dev", "/code", "/proc/sys/kernel", "/proc/1", "/var/tmp"]:
    for change in (lambda: open(folder + "/kd-escape", "w"), lambda: os.mkdir(folder + "/kd-folder"),
                   lambda: os.symlink("/", folder + "/kd-link"), lambda: os.chmod(folder, 0o777)):
        try:
            change()
            written.append(folder)
        except OSError:
            pass
for path in ("/dev/null", "/usr/bin/env", "/code/main.py"):
    for change in (lambda: os.chmod(path, 0o777), lambda: os.utime(path), lambda: os.remove(path), lambda: os.truncate(path, 0)):
        try:
            change()
            written.append(path)
        except OSError:
            pass
for path in ("/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/proc/sys/vm/drop_caches", "/proc/acpi/wakeup"):
    try:
        open(path, "w").write("0")
        written.append(path)
    except OSError:
        pass
open("/tmp/mine", "w").write("mine")
print(json.dumps(written))
"""
    mode = os.stat("/dev/null").st_mode
    outside = [str(tmp_path), str(ROOT), str(Path.home())]
    assert set(said_by(sandbox.run("python", program, json.dumps(outside)))) <= {"/dev/null"}  # its time was touched
    assert list(tmp_path.iterdir()) == [] and os.stat("/dev/null").st_mode == mode
    assert sandbox.run("python", "import os; print(os.listdir('/tmp'))").stdout == "[]\n"


def test_no_capability_no_namespace_no_mount_and_no_memory_that_no_limit_sees(sandbox):
    program = """
import ctypes, json, mmap, os, socket
call = ctypes.CDLL(None, use_errno=True).syscall
gained = [line for line in open("/proc/self/status") if line.startswith("Cap") and int(line.split()[1], 16)]
try:
    os.memfd_create("x")
    gained.append("memfd")
except OSError:
    pass
for flags in (mmap.MAP_SHARED | mmap.MAP_ANONYMOUS, 3 | mmap.MAP_ANONYMOUS, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | 0x40000):
    try:
        mmap.mmap(-1, 4096, flags)
        gained.append("shared memory")
    except OSError:
        pass
mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
gained += ["/dev/zero"] if os.path.exists("/dev/zero") else []
try:
    socket.socketpair()[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 30)
    gained.append("large buffers")
except OSError:
    pass
libc = ctypes.CDLL(None)
for name, arguments in {"unshare": (0x10000000,), "shmget": (0, 1 << 30, 0o1600), "setuid": (0,), "chroot": (b"/tmp",),
        "mount": (b"none", b"/tmp", b"tmpfs", 0, 0), "ptrace": (16, 1, 0, 0), "sethostname": (b"x", 1)}.items():
    if getattr(libc, name)(*arguments) >= 0:
        gained.append(name)
clone_newuser = os.uname().machine == "x86_64" and call(56, 0x10000000 | 17, 0, 0, 0, 0)
if clone_newuser == 0:
    os._exit(0)
print(json.dumps(gained + (["clone"] if clone_newuser and clone_newuser > 0 else [])))
"""
    assert said_by(sandbox.run("python", program)) == []


def test_nothing_but_the_sandbox_can_be_killed(sandbox):
    program = """
import os, signal
for target in (1, 0, -1, os.getppid(), *range(2, 200)):
    if target not in (0, -1, os.getpid()):
        try:
            os.kill(target, 9)
        except OSError:
            pass
try:
    os.kill(-1, signal.SIGTERM)
finally:
    print(sorted(int(name) for name in os.listdir("/proc") if name.isdigit()) == [1, os.getpid()])
"""
    assert sandbox.run("python", program, str(os.getpid())).stdout == "True\n"


def test_daemons_end_with_their_program(sandbox):
    seconds = f"86400.{os.getpid()}"
    program = f"""
import os
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execvp("sleep", ["sleep", "{seconds}"])
    os._exit(0)
os.wait()
print("left")
"""
    outcome = sandbox.run("python", program, limits=SMALL)
    assert (outcome.status, outcome.stdout) == ("ok", "left\n")
    assert not is_running(seconds)


def test_programs_end_with_the_process_that_runs_them():
    seconds = f"86401.{os.getpid()}"
    inner = f"import os; os.execvp('sleep', ['sleep', '{seconds}'])"
    code = f"from kdcache.judge.sandbox import Sandbox; Sandbox().run('python', {inner!r})"
    with subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}) as process:
        while process.poll() is None and not any(
            f"sleep\0{seconds}" in path.read_text(errors="replace") for path in _command_lines()
        ):
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and not is_running(seconds)


def _command_lines():
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        if os.access(path, os.R_OK) and path.exists():
            yield path


def test_ctrl_c_ends_programs_whatever_time_they_have(tmp_path):
    code = (
        "from kdcache.judge.sandbox import Sandbox\n"
        "from kdcache.judge.sandbox.limits import Limits\n"
        "from kdcache.judge.sandbox.pool import side_by_side\n"
        "import signal\n"
        "from pathlib import Path\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which a shell's background job lacks
        "long = Limits(wall_seconds=600, cpu_seconds=600)\n"
        "sandbox = Sandbox()\n"
        f"touch = Path({str(tmp_path)!r})\n"
        "def run(n):\n    (touch / str(n)).touch()\n"
        "    return sandbox.run('python', f'import time; time.sleep(600 + {n})', limits=long)\n"
        "side_by_side(run, range(9), 2)"
    )
    with subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}) as process:
        while process.poll() is None and len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(timeout=20) == -signal.SIGINT  # where it took 600 s
        finally:
            process.kill()


# --- no more than it was given ----------------------------------------------------------------------------------------

GREEDY = {
    "a loop": ("while True: pass", "timeout"),
    "a loop that ignores signals": (
        "import signal\nfor n in (15, 24): signal.signal(n, signal.SIG_IGN)\nwhile True: pass",
        "timeout",
    ),
    "sleep": ("import time; time.sleep(1000)", "timeout"),
    "waiting for a child that sleeps": ("import os, time\nos.fork() and os.wait()\ntime.sleep(1000)", "timeout"),
    "a large list": ("x = [0] * 10**9", "memory"),
    "memory by and by": ("x = []\nwhile True: x.append(bytearray(1 << 20))", "memory"),
    "memory of many processes": (
        "import os, time\nfor _ in range(6):\n    if os.fork() == 0: break\nx = bytearray(10**8); time.sleep(1000)",
        "memory",
    ),
    "a fork bomb": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", None),
    "a bomb that hides": (
        "import os\nwhile True:\n    try:\n        if os.fork(): os._exit(0)\n        os.setsid()\n    except OSError: pass",
        "ok",
    ),
    "threads": (
        "import threading, time\nwhile True:\n    try: threading.Thread(target=time.sleep, args=(99,)).start()\n"
        "    except Exception: pass",
        None,
    ),
    "stdout": ("import sys\nwhile True: sys.stdout.write('x' * 65536)", "output"),
    "stderr": ("import sys\nwhile True: sys.stderr.write('x' * 65536)", "output"),
    "stdout of many processes": ("import os\nos.fork(); os.fork()\nwhile True: os.write(1, b'x' * 4096)", "output"),
    "a large file": ("open('/tmp/x', 'wb').truncate(1 << 40)", "error"),
    "many large files": ("for n in range(99): open(f'/tmp/{n}', 'wb').write(b'x' * (7 << 20))", "error"),
    "very many files": ("n = 0\nwhile True: open(f'/tmp/{n}', 'w').close(); n += 1", "memory"),
    "open files": ("kept = []\nwhile True: kept.append(open('/dev/null'))", "error"),
    "large files in shared memory": (
        "for n in range(99): open(f'/dev/shm/{n}', 'wb').write(b'x' * (7 << 20))",
        "error",
    ),
}


@pytest.mark.parametrize("name", GREEDY)
def test_a_greedy_python_program_is_ended(sandbox, name):
    program, status = GREEDY[name]
    outcome = sandbox.run("python", program, limits=SMALL)
    assert outcome.status == status or (status is None and outcome.status != "ok"), outcome.stderr[-500:]
    assert outcome.seconds < 3 * SMALL.wall_seconds
    assert len(outcome.stdout) <= SMALL.output_bytes and len(outcome.stderr) <= SMALL.output_bytes
    assert sandbox.run("python", "print('still here')", name).stdout == "still here\n"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("volatile int i = 0; while (true) i++;", "timeout"),
        ("vector<string> v; while (true) v.push_back(string(1 << 20, 'x'));", "memory"),
        ('while (true) puts("flood");', "output"),
        ("while (true) fork();", None),
        ("int *p = nullptr; return *(volatile int *)p;", "error"),
    ],
)
def test_a_greedy_cpp_program_is_ended(sandbox, body, status):
    outcome = sandbox.run("cpp", "#include <unistd.h>\n" + CPP % body, limits=SMALL)
    assert outcome.status == status or (status is None and outcome.status != "ok"), outcome
    assert outcome.seconds < 3 * SMALL.wall_seconds


def test_a_compiler_that_is_led_astray_is_ended(sandbox, monkeypatch):
    monkeypatch.setattr(sandbox_module, "COMPILER_LIMITS", SMALL)
    for source in ('#include "/dev/zero"', "template<int n> struct A { A<n+1> a; }; A<0> a;", "#include __FILE__"):
        outcome = sandbox.run("cpp", source)
        assert outcome.status == "compile" and outcome.seconds < 3 * SMALL.wall_seconds


# --- closed where it cannot be made -----------------------------------------------------------------------------------


def test_without_bubblewrap_nothing_is_run_and_how_to_get_it_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(KDError, match=r"apt install bubblewrap.*--unsafe-exec"):
        Sandbox().run("python", "print(1)")


def test_a_bubblewrap_that_cannot_make_a_sandbox_is_quoted(monkeypatch):
    monkeypatch.setattr(walls, "bubblewrap", lambda proc, limits: ["bwrap", "--no-such-option"])
    with pytest.raises(KDError, match=r"cannot make a sandbox here .*no-such-option.*--unsafe-exec"):
        Sandbox().run("python", "print(1)")


def test_a_machine_without_a_filter_runs_nothing(monkeypatch):
    monkeypatch.setattr(seccomp.platform, "machine", lambda: "pdp11")
    seccomp.filter_program.cache_clear()
    try:
        with pytest.raises(KDError, match="pdp11"):
            Sandbox().run("python", "print(1)")
    finally:
        seccomp.filter_program.cache_clear()


def test_a_program_cannot_take_the_sign_that_it_was_started(sandbox):
    program = """#include <cstdio>
#include <initializer_list>
int main() {
    for (const char *path : {"/proc/self/fd/0", "/proc/1/fd/0", "/proc/2/fd/0"})
        if (FILE *file = fopen(path, "r")) printf("%d", fgetc(file));
}"""
    assert sandbox.run("cpp", program, limits=SMALL).status == "ok"


def test_a_program_cannot_make_its_failure_look_like_the_sandboxs(sandbox):
    outcome = sandbox.run("python", "import os; os.write(2, b'bwrap: no'); os._exit(1)")
    assert outcome.status == "error"


def test_what_is_unsafe_is_asked_for_and_still_limited(monkeypatch):
    bare = Sandbox(unsafe=True)
    assert bare.run("python", "print(input())", "5").stdout == "5\n"
    assert bare.run("cpp", CPP % 'puts("5");').stdout == "5\n"
    assert bare.run("python", "while True: pass", limits=SMALL).status == "timeout"
    assert bare.run("python", "x = [0] * 10**9", limits=SMALL).status == "memory"
    assert bare.run("python", "while True: print('x' * 9999)", limits=SMALL).status == "output"


def test_threads_can_share_a_sandbox_from_its_first_program_on():
    shared, outputs = Sandbox(), []
    threads = [threading.Thread(target=lambda: outputs.append(shared.run("python", "print(1)").stdout)) for _ in "123"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outputs == ["1\n"] * 3
