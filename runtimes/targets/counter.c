/* A plugin of qemu 7.2 (plugin API 1) that counts the A64 instructions of a program by kind.
 *
 *     qemu-aarch64 -plugin counter.so,out=FILE ...
 *
 * At each system call getpgid(0x515700 + number) it appends a line to FILE, with what was executed since the
 * one before. Counters are added to inside translated code and are not atomic: for one thread only.
 *
 * The masks are of the Arm Architecture Reference Manual, C4.1 "A64 instruction set encoding". The few
 * declarations of the API are here, so that no header of qemu is needed.
 */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

typedef uint64_t plugin_id;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
struct qemu_info_t;
typedef void on_translation(plugin_id, struct qemu_plugin_tb *);
typedef void on_system_call(plugin_id, unsigned, int64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t,
                            uint64_t, uint64_t, uint64_t);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *);
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *, int operation, void *, uint64_t);
void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id, on_translation *);
void qemu_plugin_register_vcpu_syscall_cb(plugin_id, on_system_call *);

enum { TOTAL, LOAD_STORE, BRANCH, SIMD, FMLA, DOT, KINDS };
enum { ADD = 0, GETPGID = 155, MARK = 0x5157 };
static const char *names[KINDS] = {"total", "load_store", "branch", "simd", "fmla", "dot"};
static uint64_t executed[KINDS], reported[KINDS];
static FILE *out;

static void translated(plugin_id id, struct qemu_plugin_tb *block) {
  uint64_t count[KINDS] = {0};
  size_t length = qemu_plugin_tb_n_insns(block);
  for (size_t i = 0; i < length; i++) {
    uint32_t word;
    memcpy(&word, qemu_plugin_insn_data(qemu_plugin_tb_get_insn(block, i)), sizeof word);
    count[TOTAL]++;
    count[LOAD_STORE] += ((word >> 25) & 5) == 4;
    count[BRANCH] += ((word >> 26) & 7) == 5;
    count[SIMD] += ((word >> 25) & 7) == 7;
    count[FMLA] += (word & 0xBFA0FC00) == 0x0E20CC00 || (word & 0xBF80F400) == 0x0F801000;
    count[DOT] += (word & 0x9F20FC00) == 0x0E009400 || (word & 0x9F00F400) == 0x0F00E000;
  }
  for (int kind = 0; kind < KINDS; kind++)
    if (count[kind]) qemu_plugin_register_vcpu_tb_exec_inline(block, ADD, &executed[kind], count[kind]);
}

static void called(plugin_id id, unsigned cpu, int64_t number, uint64_t a1, uint64_t a2, uint64_t a3, uint64_t a4,
                   uint64_t a5, uint64_t a6, uint64_t a7, uint64_t a8) {
  if (number != GETPGID || a1 >> 8 != MARK || !out) return;
  fprintf(out, "%d", (int)(a1 & 255));
  for (int kind = 0; kind < KINDS; kind++) {
    fprintf(out, " %s=%" PRIu64, names[kind], executed[kind] - reported[kind]);
    reported[kind] = executed[kind];
  }
  fputc('\n', out);
  fflush(out);
}

__attribute__((visibility("default"))) int qemu_plugin_version = 1;

__attribute__((visibility("default"))) int qemu_plugin_install(plugin_id id, const struct qemu_info_t *info,
                                                                int argc, char **argv) {
  for (int i = 0; i < argc; i++)
    if (!strncmp(argv[i], "out=", 4)) out = fopen(argv[i] + 4, "a");
  if (!out) return 1;
  qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
  qemu_plugin_register_vcpu_syscall_cb(id, called);
  return 0;
}
