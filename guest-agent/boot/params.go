// SPDX-License-Identifier: Apache-2.0

// Package boot brings a bare kernel to the point where the agent can serve:
// command line, early mounts, kernel modules, loopback. It does the least that
// the first RPC needs; the rest is loaded on demand.
package boot

import (
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"time"

	"github.com/kata-v2/kata/guest-agent/agentlog"
	"github.com/kata-v2/kata/protocols"
)

// Params are the agent's kernel command line parameters. Names and defaults are
// those of the Kata Containers 4.1 agent, plus protocols.ParamReadyPort.
type Params struct {
	// LogLevel is the least level that is logged.
	LogLevel slog.Level
	// LogPort serves the log on this vsock port; 0 logs to the console.
	LogPort uint32
	// DebugConsole enables a shell; DebugConsolePort 0 means /dev/console.
	DebugConsole     bool
	DebugConsolePort uint32
	// ServerCID and ServerPort are the ttrpc listen address.
	ServerCID, ServerPort uint32
	// Channel is the name of a virtio-serial port to use in place of vsock; empty for vsock.
	Channel string
	// ReadyPort is the host's vsock port to dial once serving; 0 means none.
	ReadyPort uint32
	// StdioPort is the port for stdio streams; 0 turns streams off.
	StdioPort uint32
	// StreamsAsked is set when the host named StdioPort itself: it knows streams,
	// so a process without any port wants no stdio rather than polling.
	StreamsAsked bool
	// HotplugTimeout bounds the wait for a device.
	HotplugTimeout time.Duration
	// LaunchTimeout bounds the OCI engine's work for one process.
	LaunchTimeout time.Duration
	// PipeSize is the size of stdio pipes in bytes, 256 KiB unless the parameter says otherwise; 0 keeps the kernel's 64 KiB.
	PipeSize int
	// DevMode allows the agent to dump core.
	DevMode bool
}

// DefaultParams is what an empty command line means.
func DefaultParams() Params {
	return Params{
		LogLevel:   slog.LevelInfo,
		ServerCID:  1<<32 - 1,
		ServerPort: protocols.AgentPort,
		StdioPort:  protocols.StdioPort,
		// Kata's agent has 3 s, which is not enough where 64 emulated guests start at
		// one time on two cores; the wait ends with the caller's deadline too.
		HotplugTimeout: 30 * time.Second,
		// Kata's agent has 6 s, which an emulated guest on a busy host can need; the
		// caller's own deadline is there as well.
		LaunchTimeout: 60 * time.Second,
		// Four times the kernel's: fewer switches between the process and the agent
		// (bulk output 38 to 59 MB/s rather than 18 to 35 in an emulated guest). An
		// empty pipe holds no memory.
		PipeSize: 256 << 10,
	}
}

// ParseCmdline reads the agent.* words of a kernel command line. Unknown ones
// are ignored, so that an image runs under a newer host. A value that does not
// parse keeps its default and is reported in bad, one message each.
func ParseCmdline(cmdline string) (p Params, bad []string) {
	p = DefaultParams()
	for _, word := range strings.Fields(cmdline) {
		key, val, _ := strings.Cut(word, "=")
		if !strings.HasPrefix(key, "agent.") {
			continue
		}
		if err := p.set(key, strings.Trim(val, `"`)); err != nil {
			bad = append(bad, fmt.Sprintf("kernel parameter %s: %v; the default is kept", word, err))
		}
	}
	return p, bad
}

func (p *Params) set(key, val string) error {
	switch key {
	case protocols.ParamLogLevel:
		return setParsed(&p.LogLevel, val, agentlog.ParseLevel)
	case protocols.ParamLogPort:
		return setParsed(&p.LogPort, val, parsePort)
	case protocols.ParamDebugConsole:
		return setParsed(&p.DebugConsole, val, parseFlag)
	case protocols.ParamDebugConsolePort:
		return setParsed(&p.DebugConsolePort, val, parsePort)
	case protocols.ParamServerAddr:
		return p.setServer(val)
	case protocols.ParamChannel:
		p.Channel = val
	case protocols.ParamReadyPort:
		return setParsed(&p.ReadyPort, val, parsePort)
	case protocols.ParamStdioPort:
		if err := setParsed(&p.StdioPort, val, parsePort); err != nil {
			return err
		}
		p.StreamsAsked = p.StdioPort != 0
	case protocols.ParamHotplugTimeout:
		return setParsed(&p.HotplugTimeout, val, parseSeconds)
	case protocols.ParamLaunchTimeout:
		return setParsed(&p.LaunchTimeout, val, parseSeconds)
	case protocols.ParamPipeSize:
		return setParsed(&p.PipeSize, val, parseSize)
	case "agent.devmode":
		return setParsed(&p.DevMode, val, parseFlag)
	}
	return nil
}

func (p *Params) setServer(val string) error {
	rest, ok := strings.CutPrefix(val, "vsock://")
	cidText, portText, ok2 := strings.Cut(rest, ":")
	if !ok || !ok2 {
		return fmt.Errorf("want vsock://<cid>:<port>, such as vsock://-1:%d", protocols.AgentPort)
	}
	cid, err := strconv.ParseInt(cidText, 10, 64)
	if err != nil || cid < -1 || cid > 1<<32-1 {
		return fmt.Errorf("context id %q: want -1 or a 32-bit number", cidText)
	}
	port, err := parsePort(portText)
	if err != nil {
		return err
	}
	p.ServerCID, p.ServerPort = uint32(cid), port
	return nil
}

func setParsed[T any](dst *T, val string, parse func(string) (T, error)) error {
	v, err := parse(val)
	if err != nil {
		return err
	}
	*dst = v
	return nil
}

func parsePort(s string) (uint32, error) {
	n, err := strconv.ParseUint(s, 10, 32)
	if err != nil {
		return 0, fmt.Errorf("%q is not a vsock port (0 to 4294967295)", s)
	}
	return uint32(n), nil
}

// parseFlag takes a bare word as true.
func parseFlag(s string) (bool, error) {
	if s == "" {
		return true, nil
	}
	b, err := strconv.ParseBool(s)
	if err != nil {
		return false, fmt.Errorf("%q is neither true nor false", s)
	}
	return b, nil
}

func parseSeconds(s string) (time.Duration, error) {
	n, err := strconv.ParseUint(s, 10, 31)
	if err != nil {
		return 0, fmt.Errorf("%q is not a number of seconds", s)
	}
	return time.Duration(n) * time.Second, nil
}

func parseSize(s string) (int, error) {
	n, err := strconv.ParseUint(s, 10, 31)
	if err != nil {
		return 0, fmt.Errorf("%q is not a number of bytes", s)
	}
	return int(n), nil
}
