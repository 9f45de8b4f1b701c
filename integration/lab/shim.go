// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/ttrpc"
)

// Shim speaks containerd's Task API to a shim.
type Shim struct {
	task.TTRPCTaskService
	client *ttrpc.Client
}

// Close ends the connection.
func (s *Shim) Close() error { return s.client.Close() }

// DialShim connects to the shim of a task of this containerd.
func (c *Containerd) DialShim(id string) (*Shim, error) {
	address, err := os.ReadFile(filepath.Join(c.Bundle(id), "address"))
	if err == nil {
		return DialShimAt(string(address))
	}
	// What containerd 2 keeps of the answer of any shim (core/runtime/v2, bootstrap.json).
	var bootstrap struct {
		Address string `json:"address"`
	}
	data, berr := os.ReadFile(filepath.Join(c.Bundle(id), "bootstrap.json"))
	if berr == nil {
		berr = json.Unmarshal(data, &bootstrap)
	}
	if berr != nil || bootstrap.Address == "" {
		return nil, fmt.Errorf("lab: shim of %s: %w", id, errors.Join(err, berr))
	}
	return DialShimAt(bootstrap.Address)
}

// DialShimAt connects to the shim at an address as its start command prints it.
func DialShimAt(address string) (*Shim, error) {
	conn, err := net.Dial("unix", strings.TrimPrefix(strings.TrimSpace(address), "unix://"))
	if err != nil {
		return nil, fmt.Errorf("lab: shim: %w", err)
	}
	client := ttrpc.NewClient(conn)
	return &Shim{task.NewTTRPCTaskClient(client), client}, nil
}
