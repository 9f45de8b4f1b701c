// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/kata-v2/kata/guest-agent/boot"
	"github.com/kata-v2/kata/guest-agent/fault"
	"github.com/kata-v2/kata/protocols"
	"github.com/kata-v2/kata/protocols/agentpb"
)

// layersDir is where layers are mounted, each group in a directory of its own. It
// is short: an overlay names all its layers within one page.
const layersDir = "/run/l"

// IsLayer tells whether a Storage is one of a group for AddLayers.
func IsLayer(s *agentpb.Storage) bool {
	return slices.Contains(s.GetOptions(), protocols.OptMultiLayer)
}

// layers is a group of Storages sorted out.
type layers struct {
	mp      string
	lowers  []layer
	upper   *layer
	memory  bool     // the upper directory is in the guest's memory
	overlay []string // options of the overlay
	rootDir string   // directory of upper that is the root, when there are no lowers
}

// layer is one mount below the overlay.
type layer struct {
	storage   *agentpb.Storage
	options   []string // for mount(2)
	partition int      // 0 for the whole disk
	devices   []device // the further devices of an EROFS
	verity    *verity
}

// device is a partition with data of a layer.
type device struct {
	partition int
	verity    *verity
}

// AddLayers mounts a root filesystem of several layers for container cid and
// returns the mount point to give back to Remove. The Storages are those of one
// request for which IsLayer is true.
func (m *Manager) AddLayers(ctx context.Context, group []*agentpb.Storage, cid string) (string, error) {
	g, err := sortLayers(group)
	if err != nil {
		return "", err
	}
	return m.add(ctx, entry{umount: true}, g.mp, fmt.Sprintf("%d layers from %q", len(group), group[0].Source), func(e *entry) error {
		return m.stack(ctx, g, e)
	})
}

// sortLayers reads what the options say.
func sortLayers(group []*agentpb.Storage) (*layers, error) {
	g := &layers{}
	for _, s := range group {
		mp, err := cleanMountPoint(s)
		if err != nil {
			return nil, err
		}
		if g.mp != "" && g.mp != mp {
			return nil, fault.New(fault.InvalidArgument, "layers of two root filesystems in one request: %s and %s", g.mp, mp)
		}
		g.mp = mp
		if s.Driver != "blk" && s.Driver != "mmioblk" {
			return nil, fault.New(fault.InvalidArgument, "layer with storage driver %q: want blk or mmioblk", s.Driver)
		}
		l, upper, err := g.read(s)
		switch {
		case err != nil:
			return nil, err
		case !upper:
			g.lowers = append(g.lowers, l)
		case g.upper != nil:
			return nil, fault.New(fault.InvalidArgument, "root filesystem %s has two upper layers", mp)
		default:
			g.upper = &l
		}
	}
	switch {
	case len(g.lowers) == 0 && g.rootDir == "":
		return nil, fault.New(fault.InvalidArgument, "root filesystem %s has no lower layer", g.mp)
	case len(g.lowers) > 0 && g.rootDir != "":
		return nil, fault.New(fault.InvalidArgument, "root filesystem %s: %s%s beside lower layers", g.mp, protocols.OptRootDir, g.rootDir)
	case g.rootDir != "" && !filepath.IsLocal(g.rootDir):
		return nil, fault.New(fault.InvalidArgument, "root filesystem %s: directory %q: want one below the upper layer", g.mp, g.rootDir)
	}
	return g, nil
}

// read sorts the options of one layer.
func (g *layers) read(s *agentpb.Storage) (l layer, upper bool, err error) {
	l.storage = s
	upper = s.Fstype != "erofs"
	for _, o := range s.Options {
		key, value, _ := strings.Cut(o, "=")
		switch {
		case o == protocols.OptOverlayUpper:
			upper = true
		case o == protocols.OptOverlayLower:
			upper = false
		case o == protocols.OptMemoryUpper:
			g.memory = true
		case key+"=" == protocols.OptOverlay:
			g.overlay = append(g.overlay, value)
		case key+"=" == protocols.OptRootDir:
			g.rootDir = value
		case key+"=" == protocols.OptPartition:
			if l.partition, err = partitionOf(o, value); err != nil {
				return l, upper, err
			}
		case key+"=" == protocols.OptDevicePartition:
			d, err := deviceOf(o, value)
			if err != nil {
				return l, upper, err
			}
			l.devices = append(l.devices, d)
		case !strings.HasPrefix(o, "X-kata.") && !strings.HasPrefix(o, optLayerPrefix):
			l.options = append(l.options, o)
		}
	}
	l.verity, err = verityOf(s.Options)
	return l, upper, err
}

// partitionOf is the partition that an option names.
func partitionOf(option, value string) (int, error) {
	n, err := strconv.Atoi(value)
	if err != nil || n < 1 {
		return 0, fault.New(fault.InvalidArgument, "layer option %q: want a partition's number", option)
	}
	return n, nil
}

// deviceOf is the partition, and its hash tree if there is one, that an option names.
func deviceOf(option, value string) (d device, err error) {
	number, tree, has := strings.Cut(value, ":")
	if d.partition, err = partitionOf(option, number); err != nil || !has {
		return d, err
	}
	root, offset, _ := strings.Cut(tree, ":")
	d.verity, err = verityOf([]string{protocols.OptVerity, protocols.OptVerityRoot + root, protocols.OptVerityOffset + offset})
	return d, err
}

// stack mounts every layer and the overlay over them. What has to be undone later
// goes into e; on error nothing is left.
func (m *Manager) stack(ctx context.Context, g *layers, e *entry) (err error) {
	if err := m.modules.Ensure(boot.GroupBlock); err != nil {
		return err
	}
	dir := filepath.Join(m.layersDir, strconv.FormatUint(m.groups.Add(1), 10))
	e.undo = append(e.undo, func() error { return removeDirs(dir) })
	defer func() {
		if err != nil {
			err = errors.Join(e.corruption(), err, e.runUndo())
		}
	}()
	var lower []string
	disks := map[string]string{}
	for i, l := range g.lowers {
		mp := filepath.Join(dir, strconv.Itoa(i))
		if err := m.mountLayer(ctx, l, mp, append(l.options, "ro"), disks, e); err != nil {
			return fmt.Errorf("layer %d: %w", i, err)
		}
		lower = append(lower, mp)
	}
	upper, err := m.mountUpper(ctx, g, filepath.Join(dir, "u"), disks, e)
	if err != nil {
		return err
	}
	return mountRoot(m, g, lower, upper)
}

// mountRoot mounts what the container sees.
func mountRoot(m *Manager, g *layers, lower []string, upper string) error {
	switch {
	case g.rootDir != "":
		return bindRoot(filepath.Join(upper, g.rootDir), g)
	case len(lower) == 1 && upper == "": // an overlay of one directory is none
		return bindRoot(lower[0], g)
	}
	words := append([]string{"lowerdir=" + strings.Join(lower, ":")}, g.overlay...)
	if upper != "" {
		words = append(words, "upperdir="+filepath.Join(upper, "upper"), "workdir="+filepath.Join(upper, "work"))
	}
	return m.mountAt("overlay", g.mp, "overlay", words)
}

func bindRoot(source string, g *layers) error {
	if err := errors.Join(os.MkdirAll(source, 0o755), os.MkdirAll(g.mp, 0o755)); err != nil {
		return err
	}
	return bindMount(source, g.mp, Options{})
}

// mountLayer mounts one layer. disks remembers which node a place has.
func (m *Manager) mountLayer(ctx context.Context, l layer, mp string, words []string, disks map[string]string, e *entry) error {
	node, err := m.layerNode(ctx, l.storage.Source, l.partition, disks)
	if err != nil {
		return err
	}
	index := filepath.Base(mp)
	name := fmt.Sprintf("kata-%s-%s", filepath.Base(filepath.Dir(mp)), index)
	for i, d := range l.devices {
		below, err := m.layerNode(ctx, l.storage.Source, d.partition, disks)
		if err != nil {
			return err
		}
		if below, err = m.verified(d.verity, below, fmt.Sprintf("%s-%d", name, i), fmt.Sprintf("layer %s, device %d", index, i), e); err != nil {
			return fmt.Errorf("device %d: %w", i, err)
		}
		words = append(words, "device="+below)
	}
	if node, err = m.verified(l.verity, node, name, "layer "+index, e); err != nil {
		return err
	}
	if err := m.mountAt(node, mp, l.storage.Fstype, words); err != nil {
		return errors.Join(err, smallBlocks(node, l.storage.Fstype))
	}
	e.undo = append(e.undo, func() error { return unmount(mp) })
	return nil
}

// verified is the node of a dm-verity device on node, or node itself without a hash
// tree. what is the node's content, for errors.
func (m *Manager) verified(v *verity, node, name, what string, e *entry) (string, error) {
	if v == nil {
		return node, nil
	}
	device, err := m.openVerity(v, node, name)
	if err != nil {
		return "", fmt.Errorf("dm-verity on %s: %w", node, err)
	}
	device.what = fmt.Sprintf("%s (%s)", what, node)
	e.undo = append(e.undo, device.close)
	e.verities = append(e.verities, device)
	return device.node, nil
}

// smallBlocks is what a kernel before Linux 6.4 does not say of an EROFS that it
// refuses: that it has blocks smaller than a page, as tar streams behind an index
// do. It is nil for others. The size's logarithm is byte 12 of the superblock at
// byte 1024.
func smallBlocks(node, fstype string) error {
	if fstype != "erofs" {
		return nil
	}
	f, err := os.Open(node)
	if err != nil {
		return nil
	}
	defer f.Close()
	var bits [1]byte
	if _, err := f.ReadAt(bits[:], 1024+12); err != nil || bits[0] < 9 || bits[0] > 16 || 1<<bits[0] >= os.Getpagesize() {
		return nil
	}
	return fmt.Errorf("its blocks have %d bytes, which needs a guest kernel of 6.4 or newer", 1<<bits[0])
}

// layerNode is the device node of a partition, or with 0 of the disk, at source once it is there.
func (m *Manager) layerNode(ctx context.Context, source string, partition int, disks map[string]string) (string, error) {
	node, ok := disks[source]
	if !ok {
		find := m.finder.BlockByPCI
		if filepath.IsAbs(source) {
			find = m.finder.BlockByName
		}
		var err error
		if node, err = find(ctx, source); err != nil {
			return "", err
		}
		disks[source] = node
	}
	if partition == 0 {
		return node, nil
	}
	// A disk whose name ends in a digit has a p before the number (kernel block/genhd.c).
	name := "/dev/" + filepath.Base(node)
	if c := name[len(name)-1]; c >= '0' && c <= '9' {
		name += "p"
	}
	return m.finder.BlockByName(ctx, name+strconv.Itoa(partition))
}

// mountUpper mounts what is written, and makes its directories; the result is
// empty for a root that is only read.
func (m *Manager) mountUpper(ctx context.Context, g *layers, mp string, disks map[string]string, e *entry) (string, error) {
	switch {
	case g.upper != nil:
		if err := m.mountLayer(ctx, *g.upper, mp, g.upper.options, disks, e); err != nil {
			return "", fmt.Errorf("upper layer: %w", err)
		}
	case g.memory:
		if err := m.mountAt("upper", mp, "tmpfs", []string{"mode=0755"}); err != nil {
			return "", fmt.Errorf("upper layer: %w", err)
		}
		e.undo = append(e.undo, func() error { return unmount(mp) })
	default:
		return "", nil
	}
	if g.rootDir != "" {
		return mp, nil
	}
	for _, d := range []string{"upper", "work"} {
		if err := os.Mkdir(filepath.Join(mp, d), 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return "", fmt.Errorf("upper layer: %w", err)
		}
	}
	return mp, nil
}

// removeDirs removes the mount points below dir, which are empty, and dir. Never
// recursive: what is still mounted there must not be emptied.
func removeDirs(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	errs := []error{err}
	for _, e := range entries {
		errs = append(errs, os.Remove(filepath.Join(dir, e.Name())))
	}
	return errors.Join(append(errs, os.Remove(dir))...)
}
