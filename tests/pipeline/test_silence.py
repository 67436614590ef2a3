import os
import threading

from pipeline.silence import silence_libraries


def write_as_a_library_does(text: bytes) -> None:
    os.write(2, text)


def test_what_is_written_meanwhile_is_lost_and_nothing_else_is(capfd):
    write_as_a_library_does(b"before\n")
    with silence_libraries():
        write_as_a_library_does(b"meanwhile\n")
        with silence_libraries():
            write_as_a_library_does(b"within\n")
        write_as_a_library_does(b"still\n")
    write_as_a_library_does(b"after\n")
    assert capfd.readouterr().err == "before\nafter\n"


def test_silence_ends_when_the_last_thread_has_left(capfd):
    entered, leave = threading.Event(), threading.Event()

    def work() -> None:
        with silence_libraries():
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=work)
    with silence_libraries():
        thread.start()
        assert entered.wait(60)
    write_as_a_library_does(b"silent\n")
    leave.set()
    thread.join(60)
    write_as_a_library_does(b"heard\n")
    assert capfd.readouterr().err == "heard\n"


def test_silence_ends_with_an_error_and_leaves_no_descriptor_behind(capfd):
    descriptors = len(os.listdir("/dev/fd"))
    for _ in range(5):
        try:
            with silence_libraries():
                raise ValueError
        except ValueError:
            pass
    write_as_a_library_does(b"heard\n")
    assert capfd.readouterr().err == "heard\n"
    assert len(os.listdir("/dev/fd")) == descriptors


def test_closed_stderr_is_no_hindrance():
    copy = os.dup(2)
    try:
        os.close(2)
        with silence_libraries():
            pass
    finally:
        os.dup2(copy, 2)
        os.close(copy)
