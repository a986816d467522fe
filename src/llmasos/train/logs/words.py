"""What the progress and the report say, in English and Chinese; one table per language with the same keys."""

from __future__ import annotations

from llmasos.settings import settings

EN = {
    "step": "step",
    "loss": "loss",
    "left": "left",
    "skipped": "step {step} was left out: {why}",
    "evaluated": "step {step}: held-out loss {loss}{bits} ({tokens} tokens, {seconds})",
    "bits": ", {bits} bits per byte",
    "saved": "step {step}: saved",
    "resumed": "going on after step {step} of {steps}",
    "dropped": "{what} failed and is left out from now on: {why}",
    "ended.finished": "finished",
    "ended.stopped": "stopped",
    "ended.data": "out of data",
    "ended.time": "out of time",
    "ended.running": "running",
    "ended.interrupted": "interrupted",
    "ended.failed": "failed",
    "ended": "{state} after step {step} in {seconds}; {report}",
    "planned.memory": "memory: {planned} planned, {measured} measured ({off})",
    "planned.tokens_per_second": "speed: {planned} planned, {measured} measured ({off})",
    "report.training": "training",
    "report.held_out": "held-out",
    "report.smooth": "smoothed",
    "report.title": "Training run {name}",
    "report.summary": "Summary",
    "report.curves": "Curves",
    "report.samples": "What the model says",
    "report.no_samples": "No prompts were asked.",
    "report.evaluations": "Evaluations",
    "report.options": "Options",
    "report.data": "Data",
    "report.machine": "Machine and versions",
    "report.plan": "Plan",
    "report.planned": "planned",
    "report.measured": "measured",
    "report.off": "plan was off by",
    "report.none": "Nothing yet.",
    "report.loss": "Loss (nats per trained token)",
    "report.bits": "Bits per byte of held-out text",
    "report.rate": "Learning rate",
    "report.norm": "Norm of the gradient",
    "report.speed": "Tokens per second",
    "report.memory": "Memory (GiB)",
    "report.range": "from {first} at step {begin} to {last} at step {end}; lowest {least}, highest {most}",
    "report.after": "after step {step}",
    "report.prompt": "Prompt",
    "report.answer": "Answer",
    "report.skipped": "Steps that were left out",
    "report.made": "Written by LLMasOS {version}, {time}.",
    "state": "state",
    "method": "method",
    "model": "model",
    "steps": "steps",
    "tokens": "tokens read",
    "trained_tokens": "tokens trained",
    "time": "time of training",
    "speed": "tokens/s (median)",
    "mfu": "MFU (median)",
    "memory": "highest memory",
    "weights": "weights",
    "trained_weights": "weights trained",
    "first_loss": "held-out loss before",
    "last_loss": "held-out loss after",
    "best_loss": "lowest held-out loss",
    "bits_per_byte": "bits per byte",
    "train_loss": "loss of the last steps",
    "started": "begun",
    "reason": "reason",
    "sessions": "sessions",
    "folder": "folder",
    "seconds": "seconds",
    "value": "value",
    "name": "name",
    "file": "file",
    "rows": "rows",
    "hash": "SHA-256",
    "device": "device",
}
ZH = {
    "step": "步",
    "loss": "损失",
    "left": "剩余",
    "skipped": "第 {step} 步被跳过：{why}",
    "evaluated": "第 {step} 步：留出损失 {loss}{bits}（{tokens} 个词元，{seconds}）",
    "bits": "，每字节 {bits} 比特",
    "saved": "第 {step} 步：已保存",
    "resumed": "从第 {step} 步之后继续，共 {steps} 步",
    "dropped": "{what} 失败，此后不再使用：{why}",
    "ended.finished": "已完成",
    "ended.stopped": "已停止",
    "ended.data": "数据用尽",
    "ended.time": "时间用尽",
    "ended.running": "进行中",
    "ended.interrupted": "中断",
    "ended.failed": "失败",
    "ended": "第 {step} 步后{state}，用时 {seconds}；{report}",
    "planned.memory": "内存：计划 {planned}，实测 {measured}（{off}）",
    "planned.tokens_per_second": "速度：计划 {planned}，实测 {measured}（{off}）",
    "report.training": "训练",
    "report.held_out": "留出",
    "report.smooth": "平滑",
    "report.title": "训练运行 {name}",
    "report.summary": "摘要",
    "report.curves": "曲线",
    "report.samples": "模型的回答",
    "report.no_samples": "没有提问。",
    "report.evaluations": "评估",
    "report.options": "选项",
    "report.data": "数据",
    "report.machine": "机器与版本",
    "report.plan": "计划",
    "report.planned": "预计",
    "report.measured": "实测",
    "report.off": "计划偏差",
    "report.none": "还没有内容。",
    "report.loss": "损失（每个受训词元的奈特数）",
    "report.bits": "留出文本每字节的比特数",
    "report.rate": "学习率",
    "report.norm": "梯度范数",
    "report.speed": "每秒词元数",
    "report.memory": "内存（GiB）",
    "report.range": "从第 {begin} 步的 {first} 到第 {end} 步的 {last}；最低 {least}，最高 {most}",
    "report.after": "第 {step} 步之后",
    "report.prompt": "提示",
    "report.answer": "回答",
    "report.skipped": "被跳过的步",
    "report.made": "由 LLMasOS {version} 写于 {time}。",
    "state": "状态",
    "method": "方法",
    "model": "模型",
    "steps": "步数",
    "tokens": "读过的词元",
    "trained_tokens": "受训词元",
    "time": "训练时间",
    "speed": "词元/秒（中位数）",
    "mfu": "MFU（中位数）",
    "memory": "最高内存",
    "weights": "权重",
    "trained_weights": "受训权重",
    "first_loss": "之前的留出损失",
    "last_loss": "之后的留出损失",
    "best_loss": "最低的留出损失",
    "bits_per_byte": "每字节比特",
    "train_loss": "最后几步的损失",
    "started": "开始于",
    "reason": "原因",
    "sessions": "会话",
    "folder": "文件夹",
    "seconds": "秒",
    "value": "值",
    "name": "名称",
    "file": "文件",
    "rows": "行",
    "hash": "SHA-256",
    "device": "设备",
}
TABLES = {"en": EN, "zh": ZH}


class Words:
    """One language's table; `language` "" is that of the settings."""

    def __init__(self, language: str = "") -> None:
        self.language = language or settings().lang
        self._table = TABLES[self.language]

    def __call__(self, key: str, **values: object) -> str:
        return self._table[key].format(**values)


def duration(seconds: float) -> str:
    """`2.1 s`, `3:20`, `1:03:20`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def amount(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


def number(value: float | None, digits: int = 4) -> str:
    """For people: four digits that count, thousands apart."""
    if value is None or value != value:
        return "–"
    if abs(value) in (0.0, float("inf")):
        return "0" if not value else "∞" if value > 0 else "-∞"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        return f"{value:.{digits - 2}e}"
    return f"{value:.{digits}g}"
