// SPDX-License-Identifier: Apache-2.0

package config

import (
	"fmt"
	"strconv"
)

// idleKey is a key of Kata Containers that has no effect here. A key that
// promises something an operator relies on (isolation, a device, a limit) is
// accepted only with the value that is true here; ignoring it would break the
// promise silently.
type idleKey struct {
	// only, when not nil, is the one value that is accepted; it is then no
	// reason for a warning either.
	only any
	// why ends the sentence "<key> = <value> is refused: …".
	why string
}

// check judges a value of a file; noted asks for a warning.
func (k idleKey) check(key string, v any) (noted bool, err error) {
	if k.only == nil {
		return true, nil
	}
	if list, ok := v.([]string); ok && len(list) == 0 {
		v = ""
	}
	if v == k.only {
		return false, nil
	}
	return false, fmt.Errorf("%s = %s is refused: %s; leave it out or set it to %s", key, describe(v), k.why, describe(k.only))
}

// checkText judges an annotation's value.
func (k idleKey) checkText(key, s string) (bool, error) {
	var v any = s
	switch k.only.(type) {
	case bool:
		if b, err := strconv.ParseBool(s); err == nil {
			v = b
		}
	case int64:
		if i, err := strconv.ParseInt(s, 10, 64); err == nil {
			v = i
		}
	}
	return k.check(key, v)
}

// ignoredTables are whole tables of Kata Containers without effect here.
func ignoredTable(table string) bool {
	switch table {
	case "image", "netmon", "runtime.shared_mounts":
		return true
	}
	return false
}

// no is an idleKey that must be false, because turning it on promises what is not there.
func no(what string) idleKey { return idleKey{only: false, why: what + " is not implemented"} }

// none is the same for a string or list that must be empty.
func none(what string) idleKey { return idleKey{only: "", why: what + " is not implemented"} }

// upstream lists the keys of Kata Containers 4.1's QEMU configuration that are
// not in the schema.
var upstream = map[string]map[string]idleKey{
	"factory": {
		"vm_cache_endpoint": {},
		"vm_cache_number":   {only: int64(0), why: "a cache of running machines is not implemented"},
	},
	"hypervisor.qemu": {
		"block_device_aio":                         {},
		"block_device_cache_direct":                {},
		"block_device_cache_noflush":               {},
		"block_device_cache_set":                   {},
		"block_device_driver":                      {},
		"block_device_logical_sector_size":         {},
		"block_device_physical_sector_size":        {},
		"cold_plug_vfio":                           {only: "no-port", why: "VFIO is not implemented"},
		"confidential_guest":                       no("a confidential guest"),
		"contrast_imagepuller_config":              {},
		"default_bridges":                          {},
		"disable_guest_selinux":                    {only: true, why: "SELinux in the guest is not implemented"},
		"disable_image_nvdimm":                     {},
		"disable_nesting_checks":                   {},
		"disable_selinux":                          {},
		"enable_guest_swap":                        no("swap in the guest"),
		"enable_iommu":                             no("a virtual IOMMU"),
		"enable_iommu_platform":                    no("a virtual IOMMU"),
		"enable_iothreads":                         {},
		"enable_numa":                              {},
		"enable_vhost_user_store":                  no("vhost-user storage"),
		"entropy_source":                           {},
		"extra_monitor_socket":                     none("an extra monitor socket"),
		"file_mem_backend":                         {},
		"firmware_volume":                          none("a firmware volume"),
		"guest_memory_dump_paging":                 {},
		"guest_memory_dump_path":                   none("dumping guest memory"),
		"hot_plug_vfio":                            {only: "no-port", why: "VFIO is not implemented"},
		"hotplug_vfio_on_root_bus":                 {},
		"indep_iothreads":                          {},
		"kernel_verity_params":                     none("dm-verity of the guest image"),
		"machine_accelerators":                     {},
		"measurement_algo":                         {},
		"memory_offset":                            {},
		"memory_slots":                             {},
		"msize_9p":                                 {},
		"pcie_root_port":                           {},
		"pcie_switch_port":                         {},
		"pflashes":                                 none("pflash images"),
		"queue_size":                               {},
		"num_queues":                               {},
		"rootfs_type":                              {},
		"seccompsandbox":                           {},
		"sev_snp_guest":                            no("a confidential guest"),
		"snp_guest_policy":                         {},
		"snp_id_auth":                              none("a confidential guest"),
		"snp_id_block":                             none("a confidential guest"),
		"tdx_quote_generation_service_socket_port": {},
		"use_legacy_serial":                        {},
		"valid_entropy_sources":                    {},
		"valid_file_mem_backends":                  {},
		"valid_jailer_paths":                       {},
		"valid_vhost_user_store_paths":             {},
		"vhost_user_reconnect_timeout_sec":         {},
		"vhost_user_store_path":                    {},
		"virtio_fs_cache_size":                     {},
		"virtio_fs_is_dax":                         {},
		"virtio_fs_queue_size":                     {},
		"vm_rootfs_driver":                         {},
	},
	"agent.kata": {
		"cdh_api_timeout":                 {},
		"debug_console_vport":             {},
		"enable_tracing":                  {},
		"log_level":                       {},
		"mem_agent_enable":                {},
		"policy":                          none("an agent policy"),
		"reconnect_timeout_ms":            {},
		"dial_timeout_ms":                 {},
		"server_port":                     {},
		"log_port":                        {},
		"passfd_listener_port":            {},
		"health_check_request_timeout_ms": {},
	},
	"runtime": {
		"agent_name":                    {},
		"dan_conf":                      {},
		"disable_guest_empty_dir":       {},
		"emptydir_mode":                 {},
		"enable_pprof":                  {},
		"enable_tracing":                {},
		"enable_vcpus_pinning":          {},
		"experimental_force_guest_pull": no("pulling images in the guest"),
		"guest_selinux_label":           none("SELinux in the guest"),
		"hypervisor_name":               {only: "qemu", why: "the only hypervisor of this build is QEMU"},
		"jaeger_endpoint":               {},
		"jaeger_password":               {},
		"jaeger_user":                   {},
		"keep_abnormal":                 {},
		"kubelet_root_dir":              {},
		"log_level":                     {},
		"name":                          {},
		"pod_resource_api_sock":         {},
		"propagate_vcpu_cgroup":         {},
		"use_passfd_io":                 {},
		"vfio_mode":                     {},
	},
}
