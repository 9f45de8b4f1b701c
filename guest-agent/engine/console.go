// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// consoleSocket receives the master of a terminal from an OCI engine: it
// connects and passes one descriptor (runc's and crun's --console-socket).
type consoleSocket struct {
	fd   int
	path string
}

func listenConsole(path string) (*consoleSocket, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	s := &consoleSocket{fd: fd, path: path}
	if err = unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err == nil {
		err = unix.Listen(fd, 1)
	}
	if err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

// receive takes the descriptor. The engine has ended by now, so its connection
// and message are queued already or never come: nothing here waits.
func (s *consoleSocket) receive() (*os.File, error) {
	conn, _, err := unix.Accept4(s.fd, unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("the OCI engine did not connect: %w", err)
	}
	defer unix.Close(conn)
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(conn, make([]byte, 256), oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("receive: %w", err)
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil {
		return nil, fmt.Errorf("receive: %w", err)
	}
	if len(msgs) != 1 {
		return nil, fmt.Errorf("receive: %d control messages, want 1", len(msgs))
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil {
		return nil, fmt.Errorf("receive: %w", err)
	}
	if len(fds) != 1 {
		return nil, fmt.Errorf("receive: %d descriptors, want 1", len(fds))
	}
	if err := unix.SetNonblock(fds[0], true); err != nil {
		unix.Close(fds[0])
		return nil, err
	}
	return os.NewFile(uintptr(fds[0]), "console"), nil
}

func (s *consoleSocket) close() {
	unix.Close(s.fd)
	_ = unix.Unlink(s.path)
}
