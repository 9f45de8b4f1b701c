// SPDX-License-Identifier: Apache-2.0

package rpc

import (
	"bytes"
	"context"
	"errors"
	"os"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/guest-agent/fault"
	"github.com/kata-v2/kata/protocols/agentpb"
)

// GetIPTables returns the rules of the packet filter in the form of iptables-save(8).
// It is empty while no table is in use.
func (s *Service) GetIPTables(ctx context.Context, req *agentpb.GetIPTablesRequest) (*agentpb.GetIPTablesResponse, error) {
	out, err := s.packetFilter(ctx, req.IsIpv6, "save", nil, nil)
	return &agentpb.GetIPTablesResponse{Data: out}, err
}

// setWait is how long iptables-restore waits for another one, in seconds.
const setWait = "10"

// SetIPTables replaces the rules of the tables that the data names, in the form of
// iptables-save(8).
func (s *Service) SetIPTables(ctx context.Context, req *agentpb.SetIPTablesRequest) (*agentpb.SetIPTablesResponse, error) {
	if len(req.Data) == 0 {
		return nil, fault.New(fault.InvalidArgument, "data is empty: want rules as iptables-save prints them")
	}
	out, err := s.packetFilter(ctx, req.IsIpv6, "restore", []string{"--wait", setWait}, req.Data)
	return &agentpb.SetIPTablesResponse{Data: out}, err
}

// packetFilter runs iptables-<what>, or ip6tables-<what>; the kernel loads what the
// rules need.
func (s *Service) packetFilter(ctx context.Context, v6 bool, what string, args []string, data []byte) ([]byte, error) {
	if err := s.Modules.OnDemand(); err != nil {
		return nil, err
	}
	name := "iptables-" + what
	if v6 {
		name = "ip6tables-" + what
	}
	return s.tool(ctx, name, args, data)
}

// toolDirs is where programs of the guest image are.
var toolDirs = []string{"/usr/sbin/", "/sbin/", "/usr/bin/", "/bin/"}

// tool runs a program of the guest image with data as its input.
func (s *Service) tool(ctx context.Context, name string, args []string, data []byte) ([]byte, error) {
	path := ""
	for _, dir := range toolDirs {
		if _, err := os.Stat(dir + name); err == nil {
			path = dir + name
			break
		}
	}
	if path == "" {
		return nil, fault.New(fault.Unimplemented, "the guest image has no %s: add it to the image", name)
	}
	// Files, not pipes: nothing here has to be read and written at the same time.
	var files [3]*os.File
	var fds []uintptr
	for i, text := range [][]byte{data, nil, nil} {
		f, err := tempFile(text)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		files[i], fds = f, append(fds, f.Fd())
	}
	pidfd := -1
	_, exit, err := s.Reaper.Start(path, append([]string{name}, args...), &syscall.ProcAttr{
		Dir: "/", Env: []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}, Files: fds, Sys: &syscall.SysProcAttr{PidFD: &pidfd},
	})
	if pidfd >= 0 {
		defer unix.Close(pidfd)
	}
	if err != nil {
		return nil, err
	}
	code := 0
	select {
	case st := <-exit:
		code = st.Code
	case <-ctx.Done():
		_ = unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0)
		<-exit
		return nil, context.Cause(ctx)
	}
	out, err := content(files[1])
	if code != 0 {
		said, serr := content(files[2])
		return nil, errors.Join(fault.New(fault.FailedPrecondition, "%s failed with status %d: %s", name, code, bytes.TrimSpace(said)), err, serr)
	}
	return out, err
}

// content is all that a file of tempFile holds, wherever it is read or written now.
func content(f *os.File) ([]byte, error) {
	return os.ReadFile("/proc/self/fd/" + strconv.Itoa(int(f.Fd())))
}

// tempFile is an anonymous file holding data, to be read from its beginning.
func tempFile(data []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate("kata-agent", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "memfd")
	if _, err := f.WriteAt(data, 0); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}
