import contextlib
import os
import resource
import signal

from tried import attack, facts, tried


@attack
def app() -> dict:
    found = tried(
        the_server=lambda: os.kill(facts["pid"], signal.SIGKILL),
        the_server_stopped=lambda: os.kill(facts["pid"], signal.SIGSTOP),
        its_group=lambda: os.killpg(facts["group"], signal.SIGKILL),
        another_app=lambda: os.kill(facts["victim"], signal.SIGKILL),
        a_limit_of_the_server=lambda: resource.prlimit(facts["pid"], resource.RLIMIT_NOFILE, (3, 3)),
        its_priority=lambda: os.setpriority(os.PRIO_PROCESS, facts["pid"], 19),
    )
    own = {int(thread) for thread in os.listdir("/proc/self/task")}
    for number in [number for number in range(2, 400) if number not in own] + [os.getppid()]:
        with contextlib.suppress(OSError):  # whatever else there is
            os.kill(number, signal.SIGKILL)
    return found
