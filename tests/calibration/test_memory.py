import platform
import subprocess
import sys

import pytest

from quantkit.calibration import memory

HELD = """
import ctypes, re, runpy
c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
c.free.argtypes, c.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])

if {apart}:
    runpy.run_path({path!r})["large_blocks_apart"]()
c.free(c.malloc(30 << 20))  # by itself, glibc now puts all below 30 MiB into the heap
block, after = c.malloc(20 << 20), c.malloc(4096)
c.memset(block, 1, 20 << 20)
before = anonymous()
c.free(block)
print(before - anonymous())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_a_large_block_goes_back_when_it_is_freed():
    def freed(apart):
        code = HELD.format(apart=apart, path=memory.__file__)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert freed(True) > 19 << 10 > 1024 > freed(False)  # KiB, of 20 MiB


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(memory, "_glibc", lambda name: None)
    memory.large_blocks_apart()
    memory.give_back()
