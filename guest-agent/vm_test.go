// SPDX-License-Identifier: Apache-2.0

package guestagent_test

import (
	"bytes"
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/ttrpc"

	"github.com/kata-v2/kata/hypervisor/vsock"
	"github.com/kata-v2/kata/images/cpio"
	"github.com/kata-v2/kata/protocols"
	"github.com/kata-v2/kata/protocols/agentpb"
)

const (
	envKernel = "KATA_TEST_KERNEL" // an uncompressed vmlinux
	envBuild  = "KATA_BUILD"       // holds images/kata-initrd.img, which has crun and the modules
)

// guest is a real machine with this tree's agent in it.
type guest struct {
	dev *vsock.User
	agentpb.AgentServiceService
	health  agentpb.HealthService
	console *lockedBuffer
	dead    chan struct{}
	ready   time.Duration // QEMU's start to the ready dial
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func env(t *testing.T, name string) string {
	t.Helper()
	v := os.Getenv(name)
	if v == "" {
		t.Fatalf("%s is not set: run by make, or with -short", name)
	}
	return v
}

// initrd is the product's guest root followed by an archive that replaces the
// agent by this tree's and adds a root file system of busybox at /test/rootfs.
func initrd(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	bin := filepath.Join(dir, "agent")
	build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", bin, "github.com/kata-v2/kata/cmd/kata-agent")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build agent: %v\n%s", err, out)
	}
	agent, err := os.ReadFile(bin)
	if err != nil {
		t.Fatal(err)
	}
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Fatal(err)
	}
	bb, err := os.ReadFile(busybox)
	if err != nil {
		t.Fatal(err)
	}
	entries := []cpio.Entry{
		cpio.File("init", 0o755, agent),
		cpio.File("test/rootfs/bin/busybox", 0o755, bb),
		cpio.File("test/rootfs/etc/passwd", 0o644, []byte("root:x:0:0:root:/root:/bin/sh\n")),
	}
	entries = append(entries, cpio.Symlink("usr/bin/sh", "/test/rootfs/bin/busybox")) // for the debug console
	for _, d := range []string{"proc", "sys", "dev", "tmp", "run"} {
		entries = append(entries, cpio.Dir("test/rootfs/"+d, 0o755))
	}
	for _, a := range []string{"sh", "true", "false", "cat", "sleep", "echo", "id", "ls", "head", "dd", "sha256sum", "mount",
		"grep", "stty", "hostname", "kill", "ps", "touch", "mknod", "env", "nproc", "wc", "ulimit", "yes", "test", "printf", "stat", "readlink", "tail"} {
		entries = append(entries, cpio.Symlink("test/rootfs/bin/"+a, "busybox"))
	}
	var b bytes.Buffer
	base, err := os.ReadFile(filepath.Join(env(t, envBuild), "images", "kata-initrd.img"))
	if err != nil {
		t.Fatal(err)
	}
	b.Write(base)
	if err := cpio.Write(&b, entries); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "initrd")
	if err := os.WriteFile(path, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// startGuest boots a machine and returns when its agent has dialled.
func startGuest(t *testing.T, params string) *guest {
	t.Helper()
	kernel, rd := env(t, envKernel), initrd(t)
	dev, err := vsock.NewUser(vsock.UserConfig{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dev.Close() })
	ready, err := dev.Listen(2000)
	if err != nil {
		t.Fatal(err)
	}
	g := &guest{dev: dev, console: &lockedBuffer{}, dead: make(chan struct{})}
	cmd := exec.Command("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-machine", "q35,memory-backend=mem", "-accel", "tcg", "-cpu", "max,-cx16,-erms,-fsrm", "-bios", "qboot.rom",
		"-m", "256", "-object", "memory-backend-memfd,id=mem,size=256M,share=on",
		"-chardev", "socket,id=vsock0,fd=3", "-device", "vhost-user-vsock-pci,chardev=vsock0",
		"-serial", "stdio", "-kernel", kernel, "-initrd", rd,
		"-append", "console=ttyS0 quiet panic=1 agent.ready_port=2000 "+params)
	cmd.ExtraFiles = []*os.File{dev.QEMUFile()}
	cmd.Stdout, cmd.Stderr = g.console, g.console
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	start := time.Now()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_ = dev.QEMUFile().Close()
	go func() {
		_ = cmd.Wait()
		close(g.dead)
		ready.Close()
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-g.dead
		if t.Failed() {
			t.Logf("guest console:\n%s", g.console)
		}
	})
	timer := time.AfterFunc(60*time.Second, func() { _ = cmd.Process.Kill() })
	c, err := ready.Accept()
	timer.Stop()
	if err != nil {
		t.Fatalf("the guest did not become ready: %v\n%s", err, g.console)
	}
	g.ready = time.Since(start)
	c.Close()
	conn, err := dev.Dial(bounded(t), protocols.AgentPort)
	if err != nil {
		t.Fatal(err)
	}
	cl := ttrpc.NewClient(conn)
	t.Cleanup(func() { cl.Close() })
	g.AgentServiceService, g.health = agentpb.NewAgentServiceClient(cl), agentpb.NewHealthClient(cl)
	return g
}

func bounded(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// stream opens a stdio connection and returns its identity.
func (g *guest) stream(t *testing.T) (net.Conn, uint32) {
	t.Helper()
	c, err := g.dev.Dial(bounded(t), protocols.StdioPort)
	if err != nil {
		t.Fatalf("stdio: %v", err)
	}
	t.Cleanup(func() { c.Close() })
	return c, c.LocalAddr().(vsock.Addr).Port
}

// spec is a container of busybox like those of containerd.
func spec(args ...string) *agentpb.Spec {
	caps := []string{"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_KILL", "CAP_SETUID", "CAP_SETGID", "CAP_MKNOD", "CAP_SYS_CHROOT"}
	p := process(args...)
	p.Capabilities = &agentpb.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps}
	return &agentpb.Spec{
		Process: p,
		Root:    &agentpb.Root{Path: "/test/rootfs"},
		Mounts: []*agentpb.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
			{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=65536k"}},
			{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
			{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"nosuid", "noexec", "nodev", "relatime", "ro"}},
		},
		Linux: &agentpb.Linux{
			CgroupsPath:   "/default/x",
			Namespaces:    []*agentpb.LinuxNamespace{{Type: "pid"}, {Type: "ipc"}, {Type: "uts"}, {Type: "mount"}},
			MaskedPaths:   []string{"/proc/kcore", "/proc/keys"},
			ReadonlyPaths: []string{"/proc/sys", "/proc/bus"},
		},
		Hostname: "box",
	}
}

func process(args ...string) *agentpb.Process {
	return &agentpb.Process{
		Args: args, Cwd: "/", Env: []string{"PATH=/bin", "TERM=xterm"}, User: &agentpb.User{},
		Rlimits:         []*agentpb.POSIXRlimit{{Type: "RLIMIT_NOFILE", Hard: 1024, Soft: 1024}},
		NoNewPrivileges: true,
	}
}
