// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"path"
	"sort"
	"time"
)

// File is one entry of an image layer.
type File struct {
	// Path is relative, without a leading slash; parents are made as needed.
	Path string
	// Mode are the permission bits with setuid, setgid and sticky as in chmod(2).
	Mode int64
	// Dir makes a directory, Link a symbolic link to its text; else Data is a file's content.
	Dir  bool
	Link string
	Data []byte
	// UID and GID own the entry.
	UID, GID int
}

// Image is a container image for linux/amd64.
type Image struct {
	// Name is the full reference, such as "docker.io/library/busybox:latest".
	Name string
	// Layers are from the lowest up.
	Layers [][]File
	// Env, Cmd, User and WorkingDir are the defaults of its containers.
	Env, Cmd, Entrypoint []string
	User, WorkingDir     string
}

type descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int               `json:"size"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

// blobs collects content by digest.
type blobs map[string][]byte

func (b blobs) add(mediaType string, data []byte) descriptor {
	sum := sha256.Sum256(data)
	digest := hex.EncodeToString(sum[:])
	b[digest] = data
	return descriptor{MediaType: mediaType, Digest: "sha256:" + digest, Size: len(data)}
}

func (b blobs) addJSON(mediaType string, v any) (descriptor, error) {
	data, err := json.Marshal(v)
	if err != nil {
		return descriptor{}, fmt.Errorf("lab: image: %w", err)
	}
	return b.add(mediaType, data), nil
}

// Write writes the image as an OCI layout in a tar (image-spec 1.1, "OCI Image
// Layout"), for `ctr images import`. The same image gives the same bytes.
func (img Image) Write(w io.Writer) error {
	content := blobs{}
	manifest, err := img.manifest(content)
	if err != nil {
		return err
	}
	// The first is containerd's annotation for the full name, the second the specification's for the tag.
	manifest.Annotations = map[string]string{"io.containerd.image.name": img.Name, "org.opencontainers.image.ref.name": path.Base(img.Name)}
	index, err := json.Marshal(map[string]any{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": []descriptor{manifest},
	})
	if err != nil {
		return fmt.Errorf("lab: image index: %w", err)
	}
	files := []File{
		{Path: "oci-layout", Mode: 0o644, Data: []byte(`{"imageLayoutVersion":"1.0.0"}`)},
		{Path: "index.json", Mode: 0o644, Data: index},
	}
	for digest, data := range content {
		files = append(files, File{Path: "blobs/sha256/" + digest, Mode: 0o644, Data: data})
	}
	return writeTar(w, files)
}

// manifest adds the image's layers, configuration and manifest to content.
func (img Image) manifest(content blobs) (descriptor, error) {
	var layers []descriptor
	var diffIDs []string
	for i, files := range img.Layers {
		var buf bytes.Buffer
		if err := writeTar(&buf, files); err != nil {
			return descriptor{}, fmt.Errorf("layer %d: %w", i, err)
		}
		d := content.add("application/vnd.oci.image.layer.v1.tar", buf.Bytes())
		layers, diffIDs = append(layers, d), append(diffIDs, d.Digest)
	}
	config, err := content.addJSON("application/vnd.oci.image.config.v1+json", map[string]any{
		"architecture": "amd64", "os": "linux", "created": time.Unix(0, 0).UTC(),
		"config": map[string]any{"Env": img.Env, "Cmd": img.Cmd, "Entrypoint": img.Entrypoint, "User": img.User, "WorkingDir": img.WorkingDir},
		"rootfs": map[string]any{"type": "layers", "diff_ids": diffIDs},
	})
	if err != nil {
		return descriptor{}, err
	}
	return content.addJSON("application/vnd.oci.image.manifest.v1+json", map[string]any{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": config, "layers": layers,
	})
}

// writeTar writes the entries sorted by path with every parent directory before
// its children.
func writeTar(w io.Writer, files []File) error {
	byPath := map[string]File{}
	for _, f := range files {
		byPath[path.Clean(f.Path)] = f
		for dir := path.Dir(path.Clean(f.Path)); dir != "."; dir = path.Dir(dir) {
			if _, ok := byPath[dir]; !ok {
				byPath[dir] = File{Mode: 0o755, Dir: true}
			}
		}
	}
	names := make([]string, 0, len(byPath))
	for name := range byPath {
		names = append(names, name)
	}
	sort.Strings(names)
	tw := tar.NewWriter(w)
	for _, name := range names {
		if err := tw.WriteHeader(header(name, byPath[name])); err != nil {
			return fmt.Errorf("lab: image: %s: %w", name, err)
		}
		if _, err := tw.Write(byPath[name].Data); err != nil {
			return fmt.Errorf("lab: image: %s: %w", name, err)
		}
	}
	if err := tw.Close(); err != nil {
		return fmt.Errorf("lab: image: %w", err)
	}
	return nil
}

func header(name string, f File) *tar.Header {
	h := &tar.Header{Name: name, Mode: f.Mode, Uid: f.UID, Gid: f.GID, ModTime: time.Unix(0, 0), Format: tar.FormatPAX, Size: int64(len(f.Data)), Typeflag: tar.TypeReg}
	switch {
	case f.Dir:
		h.Typeflag, h.Name = tar.TypeDir, name+"/"
	case f.Link != "":
		h.Typeflag, h.Linkname, h.Mode = tar.TypeSymlink, f.Link, 0o777
	}
	return h
}
