// SPDX-License-Identifier: Apache-2.0

package ctl

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/kata-v2/kata/internal/directvolume"
)

// ShimName is the program that containerd starts for the runtime type
// RuntimeType (containerd core/runtime/v2: the last two parts of the type).
const (
	ShimName    = "containerd-shim-kata-v2"
	RuntimeType = "io.containerd.kata.v2"
)

// host says where things of the machine are; tests have their own.
type host struct {
	kvm, vhostVsock, vhostNet, tun string
	containerdConfig               string
	directVolumes                  string
	lookPath                       func(string) (string, error)
}

func thisHost() host {
	return host{
		kvm: "/dev/kvm", vhostVsock: "/dev/vhost-vsock", vhostNet: "/dev/vhost-net", tun: "/dev/net/tun",
		containerdConfig: "/etc/containerd/config.toml",
		directVolumes:    directvolume.Root,
		lookPath:         exec.LookPath,
	}
}

// programTimeout bounds a program that only prints its version.
const programTimeout = 5 * time.Second

// programVersion runs "path --version" and returns the first line.
func programVersion(ctx context.Context, path string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, programTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, "--version")
	// A child of the program that keeps the pipe open must not hold us.
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s --version: %w", path, err)
	}
	line, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
	if line == "" {
		return "", fmt.Errorf("%s --version printed nothing", path)
	}
	return line, nil
}

var numbers = regexp.MustCompile(`\b(\d+)\.(\d+)\b`)

// atLeast compares the first "<major>.<minor>" in a version line.
func atLeast(line string, major, minor int) (bool, error) {
	m := numbers.FindStringSubmatch(line)
	if m == nil {
		return false, errors.New("no version number in " + strconv.Quote(line))
	}
	a, err1 := strconv.Atoi(m[1])
	b, err2 := strconv.Atoi(m[2])
	if err := errors.Join(err1, err2); err != nil {
		return false, err
	}
	return a > major || (a == major && b >= minor), nil
}
