// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// Name is the runtime's name as containerd's configuration has it.
const Name = "io.containerd.kata.v2"

// maxStdin bounds what is read of containerd's standard input.
const maxStdin = 10 << 20

// Environment variables by which containerd passes its addresses (containerd
// core/runtime/v2/command.go).
const (
	envTTRPCAddress = "TTRPC_ADDRESS"
	envGRPCAddress  = "GRPC_ADDRESS"
)

// flags are the command line of containerd ≥ 1.4 (containerd pkg/shim/shim.go);
// "-info" takes its request from standard input.
type flags struct {
	namespace, id, bundle, address, publish, socket string
	debug, version, info                            bool
	action                                          string
}

func parseFlags(args []string) (*flags, error) {
	f := &flags{}
	fs := flag.NewFlagSet("containerd-shim-kata-v2", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.StringVar(&f.namespace, "namespace", "", "containerd namespace of the container")
	fs.StringVar(&f.id, "id", "", "id of the container")
	fs.StringVar(&f.bundle, "bundle", "", "bundle directory, when it is not the working directory")
	fs.StringVar(&f.address, "address", "", "containerd's gRPC address")
	fs.StringVar(&f.publish, "publish-binary", "", "containerd's binary")
	fs.StringVar(&f.socket, "socket", "", "socket to serve (not used)")
	fs.String("debug-socket", "", "not used")
	fs.BoolVar(&f.debug, "debug", false, "log at debug level")
	fs.BoolVar(&f.version, "v", false, "print the version")
	fs.BoolVar(&f.version, "version", false, "print the version")
	fs.BoolVar(&f.info, "info", false, "print the runtime's description as protobuf")
	if err := fs.Parse(args); err != nil {
		return nil, err
	}
	f.action = fs.Arg(0)
	return f, nil
}

// params are what one invocation of start or delete is about, whatever form
// containerd used to say it.
type params struct {
	Namespace, ID string
	Bundle        string
	TTRPCAddress  string
	Debug         bool
	// Options are the runtime options of the container, nil when none were given.
	Options *anypb.Any
	// Protobuf says that the caller speaks the bootstrap protocol of containerd
	// 2.3 and gets its answer in protobuf too.
	Protobuf bool
}

// readParams understands both bootstrap protocols: BootstrapParams on standard
// input (containerd ≥ 2.3), or flags and environment with the runtime options
// as an Any on standard input (≤ 2.2).
func readParams(f *flags, stdin io.Reader) (*params, error) {
	p := &params{Namespace: f.namespace, ID: f.id, Bundle: f.bundle, Debug: f.debug, TTRPCAddress: os.Getenv(envTTRPCAddress)}
	switch {
	case p.Namespace == "":
		return nil, errors.New("-namespace is empty: containerd passes the container's namespace")
	case p.ID == "" || p.ID != filepath.Base(p.ID) || p.ID == "." || p.ID == "..":
		return nil, fmt.Errorf("-id is %q: a container id without slashes is needed", p.ID)
	}
	if p.Bundle == "" {
		wd, err := os.Getwd()
		if err != nil {
			return nil, fmt.Errorf("bundle: %w", err)
		}
		p.Bundle = wd
	}
	if f.action != "start" {
		return p, nil
	}
	input, err := io.ReadAll(io.LimitReader(stdin, maxStdin+1))
	if err != nil {
		return nil, fmt.Errorf("read standard input: %w", err)
	}
	if len(input) > maxStdin {
		return nil, fmt.Errorf("standard input exceeds %d bytes", maxStdin)
	}
	return p, p.bootstrap(input)
}

// bootstrap tells the two forms apart: an Any parses as BootstrapParams too,
// with its type URL in the place of the id.
func (p *params) bootstrap(input []byte) error {
	if len(input) == 0 {
		return nil
	}
	var b bootapi.BootstrapParams
	if err := proto.Unmarshal(input, &b); err == nil && b.InstanceID == p.ID && b.Namespace == p.Namespace {
		p.Protobuf = true
		if b.ContainerdTtrpcAddress != "" {
			p.TTRPCAddress = b.ContainerdTtrpcAddress
		}
		p.Debug = p.Debug || b.LogLevel <= bootapi.LogLevel_LOG_LEVEL_DEBUG
		for _, e := range b.Extensions {
			if isOptions(e.GetValue()) {
				p.Options = e.Value
			}
		}
		return nil
	}
	var a anypb.Any
	if err := proto.Unmarshal(input, &a); err != nil || a.TypeUrl == "" {
		return errors.New("standard input is neither bootstrap parameters for this container nor runtime options")
	}
	p.Options = &a
	return nil
}
