// SPDX-License-Identifier: Apache-2.0

// Package house holds the tests of the repository itself: which room imports
// which, licence headers, and that nothing names the machine it was made on.
package house
