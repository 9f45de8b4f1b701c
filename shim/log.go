// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"io"
	"log/slog"
	"os"

	"golang.org/x/sys/unix"
)

// logFIFO is the named pipe in the bundle that containerd copies to its own log
// (containerd core/runtime/v2/shim_unix.go). The working directory is the bundle.
const logFIFO = "log"

// newLogger writes lines of key=value to containerd's log pipe.
func newLogger(d daemonParams) *slog.Logger {
	level := slog.LevelInfo
	if d.Debug {
		level = slog.LevelDebug
	}
	h := slog.NewTextHandler(openLog(), &slog.HandlerOptions{Level: level})
	return slog.New(h).With("sandbox", d.Group, "namespace", d.Namespace)
}

func openLog() io.Writer {
	fd, err := unix.Open(logFIFO, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return io.Discard
	}
	return &dropWriter{f: os.NewFile(uintptr(fd), logFIFO), fd: fd}
}

// dropWriter writes whole lines and never blocks: with containerd down, or slow,
// a full pipe drops lines instead of stopping the pod.
type dropWriter struct {
	f  *os.File // keeps the descriptor
	fd int
}

func (w *dropWriter) Write(p []byte) (int, error) {
	unix.Write(w.fd, p) //nolint:errcheck // EAGAIN: the line is lost, which is the point
	return len(p), nil
}
